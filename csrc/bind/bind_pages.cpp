#include <malloc.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bind/bind.h"
#include "pages/store.h"
#include "pages/ticket.h"

namespace py = pybind11;

namespace angelptm {

using pages::Frame;
using pages::Home;
using pages::PageId;
using pages::PageMover;
using pages::Store;
using pages::StoreFile;

namespace {

std::uint64_t integer(const void* address) { return reinterpret_cast<std::uint64_t>(address); }

void bind_store(py::module_& module) {
  py::enum_<Home>(module, "Home").value("HOST", Home::kHost).value("SSD", Home::kSsd);

  py::class_<Store>(module, "Store")
      .def(py::init([](std::uint64_t page_bytes, std::uint32_t host_frames,
                       const std::vector<std::tuple<std::string, std::uint32_t, double>>& files, io::Backend backend,
                       std::size_t queue_depth, bool direct, double deadline_seconds,
                       std::optional<io::FaultPlan> faults) {
             std::vector<StoreFile> specs;
             for (const auto& [path, slots, weight] : files) specs.push_back({path, slots, weight});
             return std::make_unique<Store>(
                 page_bytes, host_frames, specs,
                 pages::IoOptions{backend, queue_depth, direct, deadline_seconds, std::move(faults)});
           }),
           py::arg("page_bytes"), py::arg("host_frames"), py::arg("files"), py::kw_only(),
           py::arg("backend") = io::Backend::kAuto, py::arg("queue_depth") = 16, py::arg("direct") = true,
           py::arg("deadline_seconds") = 120.0, py::arg("faults") = std::nullopt,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "add_page",
          [](Store& store, Home home, std::uint32_t used_bytes) { return store.table().add(home, used_bytes); },
          py::arg("home"), py::arg("used_bytes"))
      .def("page_version", [](Store& store, PageId page) { return store.table().info(page).version; })
      .def("page_home", [](Store& store, PageId page) { return store.table().info(page).home; })
      .def("home_address",
           [](Store& store, PageId page) {
             const pages::PageInfo info = store.table().info(page);
             if (info.home != Home::kHost) throw std::invalid_argument("page does not live in the host tier");
             return integer(store.host().address(info.frame));
           })
      .def("publish_in_place", [](Store& store, PageId page) { store.table().publish_in_place(page); })
      .def(
          "discard", [](Store& store, PageId page) { store.mover().discard(page); },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("page_bytes", [](Store& store) { return store.host().page_bytes(); })
      .def_property_readonly("page_count", [](Store& store) { return store.table().page_count(); })
      .def_property_readonly("host_frame_count", [](Store& store) { return store.host().frame_count(); })
      .def_property_readonly("host_used_count", [](Store& store) { return store.host().used_count(); })
      .def_property_readonly("host_peak_count", [](Store& store) { return store.host().peak_count(); })
      .def_property_readonly("slot_count", [](Store& store) { return store.slots().slot_count(); })
      .def_property_readonly("slot_used_count", [](Store& store) { return store.slots().used_count(); })
      .def_property_readonly("slot_peak_count", [](Store& store) { return store.slots().peak_count(); })
      .def_property_readonly("notes", [](Store& store) { return store.notes(); })
      .def_property_readonly(
          "mover", [](Store& store) -> PageMover& { return store.mover(); },
          py::return_value_policy::reference_internal);
}

void bind_mover(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<PageMover>(module, "PageMover")
      .def("begin_load", &PageMover::begin_load, py::arg("pages"), Release())
      .def("next_loaded",
           [](PageMover& mover) -> std::optional<std::tuple<std::size_t, std::uint64_t, std::uint32_t>> {
             std::optional<pages::LoadedPage> page;
             {
               py::gil_scoped_release release;
               page = mover.next_loaded();
             }
             if (!page) return std::nullopt;
             return std::make_tuple(page->index, integer(page->address), page->bytes);
           })
      .def("take_loaded", &PageMover::take_loaded, Release())
      .def("end_load", &PageMover::end_load, Release())
      .def("staging_frame", &PageMover::staging_frame, Release())
      .def("try_staging_frame", &PageMover::try_staging_frame, Release())
      .def("release", &PageMover::release, py::arg("frame"))
      .def("write_behind", &PageMover::write_behind, py::arg("page"), py::arg("frame"), Release())
      .def("drain", &PageMover::drain, Release())
      .def("address", [](PageMover& mover, Frame frame) { return integer(mover.address(frame)); })
      .def_property_readonly("wait_seconds", py::cpp_function(&PageMover::wait_seconds, Release()))
      .def_property_readonly("read_bytes",
                             py::cpp_function([](PageMover& mover) { return mover.counters().read_bytes; }, Release()))
      .def_property_readonly(
          "written_bytes",
          py::cpp_function([](PageMover& mover) { return mover.counters().written_bytes; }, Release()));
}

}  // namespace

void bind_pages(py::module_& module) {
  py::register_exception<pages::TierCapacityError>(module, "TierCapacityError", PyExc_RuntimeError);
  py::register_exception<DeadlineError>(module, "DeadlineError", PyExc_TimeoutError);
  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket")
      .def("done", &Ticket::done)
      .def("wait", &Ticket::wait, py::arg("deadline_seconds"), py::call_guard<py::gil_scoped_release>());
  bind_store(module);
  bind_mover(module);
  module.def(
      "copy_bytes",
      [](std::uint64_t to, std::uint64_t from, std::uint64_t bytes) {
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
      },
      py::arg("to"), py::arg("from_"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "return_freed_blocks",
      [](int at_least_bytes) {
        // Setting one of them also stops glibc from raising both by itself, up to 32 MiB, as blocks are freed.
        const bool set =
            mallopt(M_MMAP_THRESHOLD, at_least_bytes) == 1 && mallopt(M_TRIM_THRESHOLD, at_least_bytes) == 1;
        malloc_trim(0);
        return set;
      },
      py::arg("at_least_bytes"));
  module.def(
      "fill_zero",
      [](std::uint64_t address, std::uint64_t bytes) { std::memset(reinterpret_cast<void*>(address), 0, bytes); },
      py::arg("address"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace angelptm
