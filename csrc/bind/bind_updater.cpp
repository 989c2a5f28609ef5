#include <pybind11/stl.h>

#include "bind/bind.h"
#include "pages/store.h"
#include "update/updater.h"

namespace py = pybind11;

namespace angelptm {

using pages::PageId;
using update::Segment;
using update::Span;
using update::Updater;
using update::UpdaterOptions;
using update::Work;

void bind_updater(py::module_& module) {
  py::class_<Span>(module, "Span")
      .def(py::init([](std::uint64_t elements, std::vector<PageId> master, std::vector<PageId> exp_avg,
                       std::vector<PageId> exp_avg_sq, std::vector<PageId> grad, std::optional<PageId> param,
                       std::optional<std::uint64_t> device_param) {
             return Span{elements,
                         std::move(master),
                         std::move(exp_avg),
                         std::move(exp_avg_sq),
                         std::move(grad),
                         param.value_or(pages::kNoPage),
                         reinterpret_cast<std::byte*>(device_param.value_or(0))};
           }),
           py::kw_only(), py::arg("elements"), py::arg("master"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
           py::arg("grad"), py::arg("param"), py::arg("device_param"));

  py::class_<Updater>(module, "Updater")
      .def(py::init([](pages::Store& store, std::size_t threads, std::vector<Span> spans, std::size_t ring_depth,
                       kernels::Rule rule, DType grad_dtype, DType param_dtype, std::size_t write_depth,
                       pages::Fetcher* fetcher, const py::object& /*memory*/) {
             constexpr std::size_t kMostThreads = 256;
             if (threads > kMostThreads) throw std::invalid_argument("an updater has at most 256 threads");
             std::vector<std::unique_ptr<io::Engine>> engines;
             for (std::size_t i = 0; i < threads; ++i) engines.push_back(store.make_engine());
             return std::make_unique<Updater>(store.table(), std::move(engines), std::move(spans),
                                              UpdaterOptions{ring_depth, rule, grad_dtype, param_dtype,
                                                             store.options().deadline_seconds, write_depth},
                                              fetcher);
           }),
           py::arg("store"), py::kw_only(), py::arg("threads"), py::arg("spans"), py::arg("ring_depth"),
           py::arg("rule"), py::arg("grad_dtype"), py::arg("param_dtype"), py::arg("write_depth") = 3,
           py::arg("fetcher") = nullptr, py::arg("memory") = py::none(), py::keep_alive<1, 2>(),
           py::keep_alive<1, 10>(), py::keep_alive<1, 11>(), py::call_guard<py::gil_scoped_release>())
      // work: [(span index, [(start, count, hyper index), ...]), ...]
      .def(
          "submit",
          [](Updater& updater, std::string what,
             const std::vector<
                 std::pair<std::uint32_t, std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint32_t>>>>& work,
             std::vector<kernels::Hyper> hypers, std::uint32_t rank) {
            std::vector<Work> items;
            for (const auto& [span, segments] : work) {
              Work item{span, {}};
              for (const auto& [start, count, hyper] : segments) item.segments.push_back(Segment{start, count, hyper});
              items.push_back(std::move(item));
            }
            const update::Tickets tickets = updater.submit(std::move(what), std::move(items), std::move(hypers), rank);
            return std::make_pair(tickets.done, tickets.published);
          },
          py::arg("what"), py::arg("work"), py::arg("hypers"), py::arg("rank") = 0)
      .def("expect", &Updater::expect, py::arg("spans"), py::call_guard<py::gil_scoped_release>())
      .def("recall", &Updater::recall, py::call_guard<py::gil_scoped_release>())
      .def("utilisation", [](const Updater& updater) {
        const update::Utilisation now = updater.utilisation();
        py::dict facts;
        facts["compute_seconds"] = now.compute_seconds;
        facts["wait_seconds"] = now.wait_seconds;
        facts["spans"] = now.spans;
        facts["published_bytes"] = now.published_bytes;
        facts["read_ahead"] = now.read_ahead;
        facts["read_bytes"] = now.io.read_bytes;
        facts["written_bytes"] = now.io.written_bytes;
        facts["resumed_count"] = now.io.resumed_count;
        facts["retried_count"] = now.io.retried_count;
        facts["failed_count"] = now.io.failed_count;
        return facts;
      });
}

}  // namespace angelptm
