#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "timeline/recorder.h"

namespace py = pybind11;

namespace angelptm {

namespace {

using timeline::Clock;
using timeline::Event;
using timeline::What;

std::int64_t nanoseconds(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

Clock::time_point time_point(std::int64_t ns) { return Clock::time_point(std::chrono::nanoseconds(ns)); }

template <typename T, typename Get>
py::array_t<T> column(const std::vector<Event>& events, const Get& get) {
  py::array_t<T> values(static_cast<py::ssize_t>(events.size()));
  T* out = values.mutable_data();
  for (const Event& event : events) *out++ = static_cast<T>(get(event));
  return values;
}

py::dict columns(const timeline::LaneEvents& lane) {
  py::dict found;
  found["name"] = lane.name;
  found["dropped"] = lane.dropped;
  found["what"] = column<std::uint8_t>(lane.events, [](const Event& event) { return event.what; });
  found["start_ns"] = column<std::int64_t>(lane.events, [](const Event& event) { return nanoseconds(event.start); });
  found["end_ns"] = column<std::int64_t>(lane.events, [](const Event& event) { return nanoseconds(event.end); });
  found["id"] = column<std::uint32_t>(lane.events, [](const Event& event) { return event.id; });
  found["bytes"] = column<std::uint64_t>(lane.events, [](const Event& event) { return event.bytes; });
  return found;
}

std::vector<std::string> what_names() {
  std::vector<std::string> names;
  for (int what = 0; what < static_cast<int>(What::kCount); ++what)
    names.emplace_back(timeline::what_name(static_cast<What>(what)));
  return names;
}

}  // namespace

void bind_timeline(py::module_& module) {
  struct Timeline {};  // a name for what belongs together; the recorder is one for the process
  py::class_<Timeline>(module, "Timeline")
      .def_static("start", &timeline::start, py::arg("capacity"), py::call_guard<py::gil_scoped_release>())
      .def_static("stop", &timeline::stop, py::call_guard<py::gil_scoped_release>())
      .def_static("recording", &timeline::recording)
      .def_static("name_lane", &timeline::name_lane, py::arg("name"), py::call_guard<py::gil_scoped_release>())
      .def_static("now_ns", [] { return nanoseconds(Clock::now()); })
      .def_static("what_names", &what_names)
      .def_static(
          "record",
          [](std::uint8_t what, std::int64_t start_ns, std::int64_t end_ns, std::uint32_t id, std::uint64_t bytes) {
            if (what >= static_cast<std::uint8_t>(What::kCount)) throw py::value_error("what: no such member");
            const py::gil_scoped_release release;
            timeline::record(static_cast<What>(what), time_point(start_ns), time_point(end_ns), id, bytes);
          },
          py::arg("what"), py::arg("start_ns"), py::arg("end_ns"), py::arg("id") = 0, py::arg("bytes") = 0)
      // ([{name, dropped, what, start_ns, end_ns, id, bytes}, ...], events of threads that got no lane)
      .def_static("take", [] {
        timeline::Taken taken;
        {
          const py::gil_scoped_release release;
          taken = timeline::take();
        }
        py::list lanes;
        for (const timeline::LaneEvents& lane : taken.lanes) lanes.append(columns(lane));
        return py::make_tuple(lanes, taken.dropped_without_lane);
      });
}

}  // namespace angelptm
