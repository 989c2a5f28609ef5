// Kernels on integer addresses: whoever calls owns the memory and keeps it alive. The GIL is released while they run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "kernels/ceiling.h"
#include "kernels/codec.h"
#include "kernels/compact.h"
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
      .def_readwrite("grad_scale", &Hyper::grad_scale)
      .def_readwrite("seed", &Hyper::seed)
      .def_readwrite("step", &Hyper::step);
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

void bind_codec(py::module_& module) {
  using kernels::MasterFormat;
  using kernels::Moment;
  using kernels::MomentCodes;
  using kernels::MomentFormat;
  py::enum_<MasterFormat>(module, "MasterFormat").value("F32", MasterFormat::kF32).value("SPLIT", MasterFormat::kSplit);
  py::enum_<MomentFormat>(module, "MomentFormat")
      .value("F32", MomentFormat::kF32)
      .value("BF16", MomentFormat::kBf16)
      .value("INT8", MomentFormat::kInt8);
  py::enum_<Moment>(module, "Moment").value("EXP_AVG", Moment::kExpAvg).value("EXP_AVG_SQ", Moment::kExpAvgSq);
  module.attr("BLOCK8") = kernels::kBlock8;
  py::class_<MomentCodes>(module, "MomentCodes")
      .def(py::init([](MomentFormat format, std::uintptr_t values, std::uintptr_t scales) {
             return MomentCodes{format, pointer<void>(values), pointer<float>(scales)};
           }),
           py::arg("format"), py::arg("values"), py::arg("scales") = 0);
  module.def("rounding_key", &kernels::rounding_key, py::arg("seed"), py::arg("step"), py::arg("unit"));
  module.def(
      "decode",
      [](Moment moment, const MomentCodes& codes, std::uintptr_t to, std::size_t count) {
        kernels::decode(moment, codes, pointer<float>(to), count);
      },
      py::arg("moment"), py::arg("codes"), py::arg("to"), py::arg("count"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "encode",
      [](Moment moment, std::uintptr_t from, const MomentCodes& codes, std::size_t count, std::uint32_t key,
         std::uint32_t first_element) {
        kernels::encode(moment, pointer<const float>(from), codes, count, {key, first_element});
      },
      py::arg("moment"), py::arg("from_"), py::arg("codes"), py::arg("count"), py::arg("key"), py::arg("first_element"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "join_master",
      [](std::uintptr_t param, std::uintptr_t remainder, std::uintptr_t master, std::size_t count) {
        kernels::join_master(pointer<const std::uint16_t>(param), pointer<const std::int16_t>(remainder),
                             pointer<float>(master), count);
      },
      py::arg("param"), py::arg("remainder"), py::arg("master"), py::arg("count"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "split_master",
      [](std::uintptr_t master, std::uintptr_t param, std::uintptr_t remainder, std::size_t count) {
        kernels::split_master(pointer<const float>(master), pointer<std::uint16_t>(param),
                              pointer<std::int16_t>(remainder), count);
      },
      py::arg("master"), py::arg("param"), py::arg("remainder"), py::arg("count"),
      py::call_guard<py::gil_scoped_release>());
  module.def(
      "step_compact",
      [](const kernels::Hyper& hyper, MasterFormat master_format, std::uintptr_t master, const MomentCodes& exp_avg,
         const MomentCodes& exp_avg_sq, std::uintptr_t grad, DType grad_dtype, std::uintptr_t old_param,
         std::uintptr_t param, DType param_dtype, std::size_t count, std::uint32_t key, std::uint32_t first_element) {
        kernels::step(hyper, kernels::CompactRun{master_format,
                                                 pointer<void>(master),
                                                 exp_avg,
                                                 exp_avg_sq,
                                                 pointer<const void>(grad),
                                                 pointer<const std::uint16_t>(old_param),
                                                 pointer<void>(param),
                                                 count,
                                                 grad_dtype,
                                                 param_dtype,
                                                 {key, first_element}});
      },
      py::arg("hyper"), py::arg("master_format"), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
      py::arg("grad"), py::arg("grad_dtype"), py::arg("old_param"), py::arg("param"), py::arg("param_dtype"),
      py::arg("count"), py::arg("key"), py::arg("first_element"), py::call_guard<py::gil_scoped_release>());
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
  // The same as leaves of the tree: [sum of squares of each one that the elements touch, in order], finiteness of all.
  module.def(
      "accumulate_leaves",
      [](std::uintptr_t dst, DType dst_dtype, std::uintptr_t src, DType src_dtype, std::size_t count, bool add,
         std::uint64_t first_element) {
        std::vector<double> sums;
        bool finite = true;
        for (std::size_t done = 0; done < count;) {
          const std::uint64_t first = first_element + done;
          const std::size_t part = std::min<std::size_t>(count - done, kernels::kBlock - first % kernels::kBlock);
          const GradStats stats =
              kernels::accumulate(pointer<void>(dst + done * itemsize(dst_dtype)), dst_dtype,
                                  pointer<const void>(src + done * itemsize(src_dtype)), src_dtype, part, add, first);
          sums.push_back(stats.sum_squares);
          finite = finite && stats.finite;
          done += part;
        }
        return std::make_pair(std::move(sums), finite);
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
  bind_codec(module);
  bind_gradient(module);
  bind_isa(module);
}

}  // namespace angelptm
