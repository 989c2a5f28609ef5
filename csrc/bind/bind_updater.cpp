#include <pybind11/stl.h>

#include "bind/bind.h"
#include "pages/store.h"
#include "update/updater.h"

namespace py = pybind11;

namespace angelptm {

using pages::PageId;
using update::Segment;
using update::Span;
using update::Sweep;
using update::SweepOptions;
using update::Updater;
using update::UpdaterOptions;
using update::Work;

namespace {

// [(span index, [(start, count, hyper index), ...]), ...]
using WorkList =
    std::vector<std::pair<std::uint32_t, std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint32_t>>>>;

std::vector<Segment> to_segments(const WorkList::value_type::second_type& segments) {
  std::vector<Segment> found;
  for (const auto& [start, count, hyper] : segments) found.push_back({start, count, hyper});
  return found;
}

// Ending an updater waits for the spans in flight, and other Python threads need not.
struct EndWithoutInterpreter {
  void operator()(Updater* updater) const {
    const py::gil_scoped_release release;
    delete updater;
  }
};
using UpdaterClass = py::class_<Updater, std::unique_ptr<Updater, EndWithoutInterpreter>>;

void bind_sweep(py::module_& module, UpdaterClass& updater) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using Spans = std::vector<std::uint32_t>;
  py::enum_<update::Order>(module, "SweepOrder")
      .value("ROUND_ROBIN", update::Order::kRoundRobin)
      .value("MOST_GRADIENTS", update::Order::kMostGradients)
      .value("NEXT_NEEDED", update::Order::kNextNeeded);
  py::enum_<update::Combine>(module, "Combine")
      .value("MEAN", update::Combine::kMean)
      .value("SUM", update::Combine::kSum);
  py::class_<SweepOptions>(module, "SweepOptions")
      .def(
          py::init([](update::Order order, update::Combine combine, std::size_t spare_frames, Spans ranks,
                      int niceness) { return SweepOptions{order, combine, spare_frames, std::move(ranks), niceness}; }),
          py::kw_only(), py::arg("order") = update::Order::kRoundRobin, py::arg("combine") = update::Combine::kMean,
          py::arg("spare_frames"), py::arg("ranks"), py::arg("niceness") = 0);
  updater
      // Takes the accumulators of spans, and says which elements of each hold gradients: [[(start, count), ...], ...].
      .def(
          "open",
          [](Updater& self, const Spans& spans) {
            self.sweep().open(spans);
            std::vector<std::vector<update::Accumulators::Range>> ranges;
            for (const std::uint32_t span : spans) ranges.push_back(self.sweep().accumulators().ranges(span));
            return ranges;
          },
          py::arg("spans"), Release())
      .def(
          "open_empty",
          [](Updater& self, const Spans& spans, const std::string& what) { self.sweep().open_empty(spans, what); },
          py::arg("spans"), py::arg("what"), Release())
      .def(
          "put_back", [](Updater& self, const Spans& spans) { self.sweep().put_back(spans); }, py::arg("spans"),
          Release())
      .def(
          "hand_over",
          [](Updater& self, const WorkList& work, const std::vector<kernels::Hyper>& hypers, bool from_step) {
            std::vector<Sweep::Piece> pieces;
            for (const auto& [span, segments] : work) pieces.push_back({span, to_segments(segments)});
            self.hand_over(pieces, hypers, from_step);
          },
          py::arg("work"), py::arg("hypers"), py::arg("from_step"), Release())
      .def(
          "wait_published",
          [](Updater& self, const Spans& spans, std::uint32_t most_behind, const std::string& what) {
            self.sweep().wait_published(spans, most_behind, what);
          },
          py::arg("spans"), py::arg("most_behind"), py::arg("what"), Release())
      .def(
          "wait_all_published",
          [](Updater& self, const Spans& spans, double seconds) {
            return self.sweep().wait_all_published(spans, seconds);
          },
          py::arg("spans"), py::arg("seconds"), Release())
      .def(
          "wait_applied",
          [](Updater& self, const Spans& spans, const std::vector<std::uint64_t>& counts, const std::string& what) {
            self.sweep().wait_applied(spans, counts, what);
          },
          py::arg("spans"), py::arg("counts"), py::arg("what"), Release())
      .def(
          "are_applied",
          [](Updater& self, const Spans& spans, const std::vector<std::uint64_t>& counts) {
            return self.sweep().are_applied(spans, counts);
          },
          py::arg("spans"), py::arg("counts"))
      .def(
          "produced",
          [](Updater& self, const Spans& spans) {
            std::vector<std::uint64_t> counts;
            for (const std::uint32_t span : spans) counts.push_back(self.sweep().produced(span));
            return counts;
          },
          py::arg("spans"))
      .def(
          "published",
          [](Updater& self, const Spans& spans) {
            std::vector<std::uint64_t> counts;
            for (const std::uint32_t span : spans) counts.push_back(self.sweep().published(span));
            return counts;
          },
          py::arg("spans"))
      .def("record", [](Updater& self) { self.sweep().record(); })
      .def("recorded",
           [](Updater& self) {
             const update::Script script = self.sweep().recorded();
             return std::make_pair(script.takes, script.uses);
           })
      .def(
          "replay",
          [](Updater& self, std::vector<Spans> takes, std::vector<Spans> uses) {
            self.sweep().replay({std::move(takes), std::move(uses)});
          },
          py::arg("takes"), py::arg("uses"))
      .def(
          "end_replay", [](Updater& self) { self.sweep().end_replay(); }, Release())
      .def(
          "used",
          [](Updater& self, const Spans& spans, const Spans& publishes) { self.sweep().used(spans, publishes); },
          py::arg("spans"), py::arg("publishes"), Release())
      .def(
          "await_use",
          [](Updater& self, const Spans& spans, const std::string& what) { self.sweep().await_use(spans, what); },
          py::arg("spans"), py::arg("what"), Release())
      .def("set_position", [](Updater& self, std::uint32_t rank) { self.sweep().set_position(rank); }, py::arg("rank"));
}

}  // namespace

void bind_updater(py::module_& module) {
  using update::StatePlace;
  using update::StateRun;
  py::class_<StatePlace>(module, "StatePlace")
      .def(py::init([](std::uint32_t page, std::uint32_t offset, std::uint32_t scales) {
             return StatePlace{page, offset, scales};
           }),
           py::arg("page"), py::arg("offset") = 0, py::arg("scales") = 0);
  py::class_<StateRun>(module, "StateRun")
      .def(py::init([](std::uint64_t start, std::uint64_t count, kernels::MasterFormat master_format,
                       kernels::MomentFormat exp_avg_format, kernels::MomentFormat exp_avg_sq_format, StatePlace master,
                       std::optional<StatePlace> exp_avg, std::optional<StatePlace> exp_avg_sq) {
             return StateRun{start,
                             count,
                             master_format,
                             exp_avg_format,
                             exp_avg_sq_format,
                             master,
                             exp_avg.value_or(StatePlace{}),
                             exp_avg_sq.value_or(StatePlace{})};
           }),
           py::kw_only(), py::arg("start"), py::arg("count"), py::arg("master_format") = kernels::MasterFormat::kF32,
           py::arg("exp_avg_format") = kernels::MomentFormat::kF32,
           py::arg("exp_avg_sq_format") = kernels::MomentFormat::kF32, py::arg("master"), py::arg("exp_avg"),
           py::arg("exp_avg_sq"));
  py::class_<Span>(module, "Span")
      .def(py::init([](std::uint64_t elements, std::vector<PageId> states, std::vector<StateRun> runs,
                       std::vector<PageId> grad, std::optional<PageId> param, std::optional<std::uint64_t> device_param,
                       std::vector<PageId> step_grad, std::uint64_t unit, std::uint64_t first_element) {
             return Span{elements,
                         std::move(states),
                         std::move(runs),
                         std::move(grad),
                         param.value_or(pages::kNoPage),
                         reinterpret_cast<std::byte*>(device_param.value_or(0)),
                         std::move(step_grad),
                         unit,
                         first_element};
           }),
           py::kw_only(), py::arg("elements"), py::arg("states"), py::arg("runs"), py::arg("grad"), py::arg("param"),
           py::arg("device_param"), py::arg("step_grad") = std::vector<PageId>(), py::arg("unit") = 0,
           py::arg("first_element") = 0);

  UpdaterClass updater(module, "Updater");
  bind_sweep(module, updater);
  updater
      .def(py::init([](pages::Store& store, std::size_t threads, std::vector<Span> spans, std::size_t ring_depth,
                       kernels::Rule rule, DType grad_dtype, DType param_dtype, std::size_t write_depth,
                       pages::Fetcher* fetcher, const py::object& /*memory*/, std::optional<SweepOptions> sweep,
                       std::uint64_t grad_page_elements) {
             constexpr std::size_t kMostThreads = 256;
             if (threads > kMostThreads) throw std::invalid_argument("an updater has at most 256 threads");
             std::vector<std::unique_ptr<io::Engine>> engines;
             for (std::size_t i = 0; i < threads; ++i) engines.push_back(store.make_engine());
             return std::unique_ptr<Updater, EndWithoutInterpreter>(
                 new Updater(store.table(), std::move(engines), std::move(spans),
                             UpdaterOptions{ring_depth, rule, grad_dtype, param_dtype, grad_page_elements,
                                            store.options().deadline_seconds, write_depth, std::move(sweep)},
                             fetcher));
           }),
           py::arg("store"), py::kw_only(), py::arg("threads"), py::arg("spans"), py::arg("ring_depth"),
           py::arg("rule"), py::arg("grad_dtype"), py::arg("param_dtype"), py::arg("write_depth") = 3,
           py::arg("fetcher") = nullptr, py::arg("memory") = py::none(), py::arg("sweep") = std::nullopt,
           py::arg("grad_page_elements") = 0, py::keep_alive<1, 2>(), py::keep_alive<1, 10>(), py::keep_alive<1, 11>(),
           py::call_guard<py::gil_scoped_release>())
      // work: [(span index, [(start, count, hyper index), ...]), ...]
      .def(
          "submit",
          [](Updater& updater, std::string what, const WorkList& work, std::vector<kernels::Hyper> hypers,
             std::uint32_t rank) {
            std::vector<Work> items;
            for (const auto& [span, segments] : work) items.push_back({span, to_segments(segments)});
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
        facts["gradients_produced"] = now.gradients.produced;
        facts["gradients_taken"] = now.gradients.taken;
        facts["gradients_published"] = now.gradients.published;
        facts["gradients_applied"] = now.gradients.applied;
        facts["read_bytes"] = now.io.read_bytes;
        facts["written_bytes"] = now.io.written_bytes;
        facts["resumed_count"] = now.io.resumed_count;
        facts["retried_count"] = now.io.retried_count;
        facts["failed_count"] = now.io.failed_count;
        return facts;
      });
}

}  // namespace angelptm
