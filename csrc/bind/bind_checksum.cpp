#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "io/crc32c.h"

namespace py = pybind11;

namespace angelptm {

namespace {

// The bytes of any bytes-like object, in memory order. Made and ended under the GIL; meanwhile the object stays and
// keeps its size. A strided or transposed one has no bytes in a row, and to copy it here would hide what that costs.
class Bytes {
 public:
  explicit Bytes(const py::object& object) {
    // Asking for the strides, so that the refusal is ours: for a plain request each exporter has an error of its own.
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_INDIRECT) != 0) throw py::error_already_set();
    if (!PyBuffer_IsContiguous(&view_, 'C')) {
      PyBuffer_Release(&view_);
      throw py::buffer_error("crc32c needs a C-contiguous buffer; make a contiguous copy first");
    }
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  ~Bytes() { PyBuffer_Release(&view_); }

  const void* data() const { return view_.buf; }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

std::vector<std::string> kind_names() {
  std::vector<std::string> names;
  for (const io::Crc32cKind kind : io::crc32c_kinds()) names.emplace_back(io::crc32c_kind_name(kind));
  return names;
}

io::Crc32cKind kind_named(const std::string& name) {
  for (const io::Crc32cKind kind : io::crc32c_kinds()) {
    if (name == io::crc32c_kind_name(kind)) return kind;
  }
  throw std::invalid_argument("no crc32c kind '" + name + "' here; see crc32c_kinds()");
}

}  // namespace

void bind_checksum(py::module_& module) {
  module.def(
      "crc32c",
      [](const py::object& data, std::uint32_t seed) {
        const Bytes bytes(data);
        const py::gil_scoped_release release;
        return io::crc32c(bytes.data(), bytes.size(), seed);
      },
      py::arg("data"), py::arg("seed") = 0);
  module.def(
      "crc32c_at",
      [](std::uintptr_t address, std::size_t bytes, std::uint32_t seed) {
        return io::crc32c(reinterpret_cast<const void*>(address), bytes, seed);
      },
      py::arg("address"), py::arg("bytes"), py::arg("seed") = 0, py::call_guard<py::gil_scoped_release>());
  module.def(
      "crc32c_with",
      [](const std::string& kind, const py::object& data, std::uint32_t seed) {
        const io::Crc32cKind chosen = kind_named(kind);
        const Bytes bytes(data);
        const py::gil_scoped_release release;
        return io::crc32c_with(chosen, bytes.data(), bytes.size(), seed);
      },
      py::arg("kind"), py::arg("data"), py::arg("seed") = 0);
  module.def("crc32c_kinds", &kind_names);
  module.def("crc32c_implementation", &io::crc32c_implementation);
}

}  // namespace angelptm
