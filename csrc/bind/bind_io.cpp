#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind/bind.h"
#include "io/crash_plan.h"
#include "io/engine.h"
#include "io/error.h"
#include "io/file.h"
#include "io/queue.h"
#include "io/shared_engine.h"

namespace py = pybind11;

namespace angelptm {

namespace {

using io::Clock;
using io::IoError;

// tag, whether it writes, file index, offset, buffer address, bytes
using TransferTuple = std::tuple<std::uint64_t, bool, int, std::uint64_t, std::uintptr_t, std::uint64_t>;

// The Python class lives with the Python backends, which raise it too; it is looked up when first needed because
// importing it here would load that package with the module.
py::object python_error(const IoError& error) {
  const py::object type = py::module_::import("io_engine.errors").attr("IoError");
  return type(io::op_name(error.op), error.path, error.offset, error.bytes, error.error, error.what());
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const IoError& error) {
    const py::object instance = python_error(error);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(instance.ptr())), instance.ptr());
  }
}

Clock::time_point after(double seconds) {
  if (std::isnan(seconds)) throw std::invalid_argument("seconds is not a number");
  // A day at most: longer waits mean forever, and the clock's range must not overflow.
  const double bounded = std::min(std::max(seconds, 0.0), 86400.0);
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded));
}

std::vector<io::Transfer> to_transfers(const std::vector<TransferTuple>& tuples) {
  std::vector<io::Transfer> transfers;
  transfers.reserve(tuples.size());
  for (const auto& [tag, write, file, offset, address, bytes] : tuples) {
    transfers.push_back(
        {tag, write ? io::Op::kWrite : io::Op::kRead, file, offset, reinterpret_cast<std::byte*>(address), bytes});
  }
  return transfers;
}

py::list to_python(const std::vector<io::Outcome>& outcomes) {
  py::list list;
  for (const io::Outcome& outcome : outcomes) {
    list.append(py::make_tuple(outcome.tag, outcome.error ? python_error(*outcome.error) : py::none()));
  }
  return list;
}

std::shared_ptr<io::SharedEngine> make_shared_engine(
    const std::vector<std::shared_ptr<io::File>>& files, std::size_t depth, io::Backend backend,
    const std::vector<std::pair<std::uintptr_t, std::uint64_t>>& regions, const io::FaultPlan* faults,
    double close_seconds) {
  std::vector<io::Region> native_regions;
  for (const auto& [address, bytes] : regions) {
    native_regions.push_back({reinterpret_cast<std::byte*>(address), bytes});
  }
  std::string because;
  auto engine = io::make_engine(backend, {files.begin(), files.end()}, std::move(native_regions), depth, faults,
                                &because, close_seconds);
  return std::make_shared<io::SharedEngine>(std::move(engine), std::move(because));
}

void bind_file(py::module_& module) {
  py::class_<io::File, std::shared_ptr<io::File>>(module, "File")
      .def(py::init([](const std::string& path, bool create, bool read_only, bool direct, bool unlink,
                       std::uint64_t allocate_bytes) {
             const py::gil_scoped_release release;
             // The const only says that sharing needs no lock; Python has no const.
             return std::const_pointer_cast<io::File>(
                 io::File::open(path, {create, read_only, direct, unlink, allocate_bytes}));
           }),
           py::arg("path"), py::kw_only(), py::arg("create") = false, py::arg("read_only") = false,
           py::arg("direct") = true, py::arg("unlink") = false, py::arg("allocate_bytes") = 0)
      .def_property_readonly("path", &io::File::path)
      .def_property_readonly("descriptor", &io::File::descriptor)
      .def_property_readonly("direct", &io::File::direct)
      .def_property_readonly("buffered_reason", &io::File::buffered_reason)
      .def_property_readonly("allocation_note", &io::File::allocation_note)
      .def_property_readonly("memory_alignment", &io::File::memory_alignment)
      .def_property_readonly("offset_alignment", &io::File::offset_alignment)
      .def_property_readonly("size_bytes", &io::File::size_bytes);
}

void bind_engine(py::module_& module) {
  py::class_<io::Counters>(module, "Counters")
      .def_readonly("read_bytes", &io::Counters::read_bytes)
      .def_readonly("written_bytes", &io::Counters::written_bytes)
      .def_readonly("read_count", &io::Counters::read_count)
      .def_readonly("write_count", &io::Counters::write_count)
      .def_readonly("resumed_count", &io::Counters::resumed_count)
      .def_readonly("retried_count", &io::Counters::retried_count)
      .def_readonly("failed_count", &io::Counters::failed_count)
      .def_readonly("sync_count", &io::Counters::sync_count);

  // The GIL is released around every call that takes the engine's lock, for another thread may hold it while it waits.
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<io::SharedEngine, std::shared_ptr<io::SharedEngine>>(module, "Engine")
      .def(py::init(&make_shared_engine), py::arg("files"), py::arg("depth"), py::kw_only(),
           py::arg("backend") = io::Backend::kAuto, py::arg("regions") = py::list(), py::arg("faults") = nullptr,
           py::arg("close_seconds") = 30.0)
      .def(
          "submit",
          [](io::SharedEngine& engine, const std::vector<TransferTuple>& tuples) {
            const std::vector<io::Transfer> transfers = to_transfers(tuples);
            const py::gil_scoped_release release;
            engine.submit(transfers);
          },
          py::arg("transfers"))
      .def(
          "reap",
          [](io::SharedEngine& engine, std::size_t at_least, double seconds) {
            std::vector<io::Outcome> outcomes;
            {
              const py::gil_scoped_release release;
              outcomes = engine.reap(at_least, after(seconds));
            }
            return to_python(outcomes);
          },
          py::arg("at_least"), py::arg("seconds"))
      .def(
          "reap_some",
          [](io::SharedEngine& engine, std::size_t at_least, double seconds) {
            std::vector<io::Outcome> outcomes;
            {
              const py::gil_scoped_release release;
              outcomes = engine.reap_some(at_least, after(seconds));
            }
            return to_python(outcomes);
          },
          py::arg("at_least"), py::arg("seconds"))
      .def(
          "sync", [](io::SharedEngine& engine, double seconds) { engine.sync(after(seconds)); }, py::arg("seconds"),
          Release())
      .def("close", &io::SharedEngine::close, Release())
      .def_property_readonly("closed", py::cpp_function(&io::SharedEngine::closed, Release()))
      .def_property_readonly("unfinished", py::cpp_function(&io::SharedEngine::unfinished, Release()))
      .def_property_readonly("counters", py::cpp_function(&io::SharedEngine::counters, Release()))
      .def_property_readonly("name", &io::SharedEngine::name)
      .def_property_readonly("depth", &io::SharedEngine::depth)
      .def_property_readonly("notes", &io::SharedEngine::notes)
      .def_property_readonly("chosen_because", &io::SharedEngine::chosen_because);
}

}  // namespace

void bind_io(py::module_& module) {
  py::register_local_exception_translator(&translate);
  py::enum_<io::Backend>(module, "Backend")
      .value("AUTO", io::Backend::kAuto)
      .value("URING", io::Backend::kUring)
      .value("THREADS", io::Backend::kThreads);
  py::class_<io::CrashPlan, std::shared_ptr<io::CrashPlan>>(module, "CrashPlan")
      .def(py::init<std::uint64_t, std::uint64_t, const std::string&>(), py::kw_only(), py::arg("seed") = 0,
           py::arg("kill_at") = 0, py::arg("journal") = "")
      .def_property_readonly("count",
                             py::cpp_function(&io::CrashPlan::count, py::call_guard<py::gil_scoped_release>()));
  py::class_<io::FaultPlan>(module, "FaultPlan")
      .def(
          py::init([](std::uint64_t seed, double short_transfer, double eintr, double eagain, double eio, double enospc,
                      double delay, double delay_seconds, bool reorder, std::shared_ptr<io::CrashPlan> crash) {
            return io::FaultPlan{seed,   short_transfer, eintr,         eagain,  eio,
                                 enospc, delay,          delay_seconds, reorder, std::move(crash)};
          }),
          py::kw_only(), py::arg("seed") = 0, py::arg("short_transfer") = 0.0, py::arg("eintr") = 0.0,
          py::arg("eagain") = 0.0, py::arg("eio") = 0.0, py::arg("enospc") = 0.0, py::arg("delay") = 0.0,
          py::arg("delay_seconds") = 0.0, py::arg("reorder") = false, py::arg("crash") = py::none());
  bind_file(module);
  bind_engine(module);
}

}  // namespace angelptm
