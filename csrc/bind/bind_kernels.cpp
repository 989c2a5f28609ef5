// Kernels on integer addresses: whoever calls owns the memory and keeps it alive. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bind/bind.h"
#include "kernels/ceiling.h"
#include "kernels/dtype.h"
#include "kernels/gradient.h"
#include "kernels/optimizer.h"

namespace py = pybind11;

namespace angelptm {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_hyper(py::module_& module) {
  using kernels::Hyper;
  using kernels::Rule;
  py::enum_<DType>(module, "DType").value("F32", DType::kF32).value("BF16", DType::kBF16);
  py::enum_<Rule>(module, "Rule").value("ADAMW", Rule::kAdamW).value("SGD", Rule::kSgd).value("LION", Rule::kLion);
  module.def("moment_count", &kernels::moment_count, py::arg("rule"));
  py::class_<Hyper>(module, "Hyper")
      .def(py::init<>())
      .def_readwrite("rule", &Hyper::rule)
      .def_readwrite("lr", &Hyper::lr)
      .def_readwrite("beta1", &Hyper::beta1)
      .def_readwrite("beta2", &Hyper::beta2)
      .def_readwrite("eps", &Hyper::eps)
      .def_readwrite("weight_decay", &Hyper::weight_decay)
      .def_readwrite("dampening", &Hyper::dampening)
      .def_readwrite("nesterov", &Hyper::nesterov)
      .def_readwrite("first_step", &Hyper::first_step)
      .def_readwrite("bias_correction1", &Hyper::bias_correction1)
      .def_readwrite("bias_correction2_sqrt", &Hyper::bias_correction2_sqrt)
      .def_readwrite("grad_scale", &Hyper::grad_scale);
}

void bind_step(py::module_& module) {
  module.def(
      "step",
      [](const kernels::Hyper& hyper, std::uintptr_t master, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
         std::uintptr_t grad, DType grad_dtype, std::uintptr_t param, DType param_dtype, std::size_t count) {
        kernels::step(hyper, {pointer<float>(master), pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                              pointer<const void>(grad), pointer<void>(param), count, grad_dtype, param_dtype});
      },
      py::arg("hyper"), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("grad"),
      py::arg("grad_dtype"), py::arg("param"), py::arg("param_dtype"), py::arg("count"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_ceiling(py::module_& module) {
  module.def(
      "memory_ceiling",
      [](std::uintptr_t master, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq, std::uintptr_t grad,
         DType grad_dtype, std::uintptr_t param, DType param_dtype, std::size_t count, bool past_cache) {
        kernels::memory_ceiling({pointer<float>(master), pointer<float>(exp_avg), pointer<float>(exp_avg_sq),
                                 pointer<const void>(grad), pointer<void>(param), count, grad_dtype, param_dtype},
                                past_cache);
      },
      py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("grad"), py::arg("grad_dtype"),
      py::arg("param"), py::arg("param_dtype"), py::arg("count"), py::arg("past_cache"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_gradient(py::module_& module) {
  using kernels::GradStats;
  py::class_<GradStats>(module, "GradStats")
      .def_readonly("sum_squares", &GradStats::sum_squares)
      .def_readonly("finite", &GradStats::finite);
  module.attr("GRAD_BLOCK") = kernels::kBlock;
  module.def(
      "accumulate",
      [](std::uintptr_t dst, DType dst_dtype, std::uintptr_t src, DType src_dtype, std::size_t count, bool add,
         std::uint64_t first_element) {
        return kernels::accumulate(pointer<void>(dst), dst_dtype, pointer<const void>(src), src_dtype, count, add,
                                   first_element);
      },
      py::arg("dst"), py::arg("dst_dtype"), py::arg("src"), py::arg("src_dtype"), py::arg("count"), py::arg("add"),
      py::arg("first_element"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "tree_sum",
      [](const std::vector<double>& values, std::uint64_t first_index) {
        return kernels::tree_sum(values.data(), values.size(), first_index);
      },
      py::arg("values"), py::arg("first_index") = 0, py::call_guard<py::gil_scoped_release>());
}

void bind_isa(py::module_& module) {
  using kernels::Isa;
  py::enum_<Isa>(module, "Isa").value("SCALAR", Isa::kScalar).value("AVX2", Isa::kAvx2).value("AVX512", Isa::kAvx512);
  module.def("isa_name", &kernels::isa_name, py::arg("isa"));
  module.def("isa_supported", &kernels::isa_supported, py::arg("isa"));
  module.def("isa_in_use", &kernels::isa_in_use);
  module.def("use_isa", &kernels::use_isa, py::arg("isa"));
}

}  // namespace

void bind_kernels(py::module_& module) {
  bind_hyper(module);
  bind_step(module);
  bind_ceiling(module);
  bind_gradient(module);
  bind_isa(module);
}

}  // namespace angelptm
