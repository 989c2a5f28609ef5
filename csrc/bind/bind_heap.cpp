#include <pybind11/pybind11.h>

#include "bind/bind.h"
#include "heap/kept_memory.h"

namespace py = pybind11;

namespace angelptm {

void bind_heap(py::module_& module) {
  module.def("return_freed_blocks", &heap::return_freed_blocks, py::arg("at_least_bytes"));
  py::class_<heap::KeptMemory>(module, "KeptMemory")
      .def(py::init<std::size_t>(), py::arg("allowance_bytes"))
      .def("look", &heap::KeptMemory::look)
      .def("trim", &heap::KeptMemory::trim)
      .def_property_readonly("trims", &heap::KeptMemory::trims);
}

}  // namespace angelptm
