#include <pybind11/stl.h>

#include <array>
#include <cstring>

#include "bind/bind.h"
#include "pages/corrupt_page.h"
#include "pages/drive_probe.h"
#include "pages/fetcher.h"
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

using SlotTuple = std::pair<std::uint32_t, std::uint32_t>;  // file, index in it

std::vector<pages::Slot> to_slots(const std::vector<SlotTuple>& tuples) {
  std::vector<pages::Slot> slots;
  slots.reserve(tuples.size());
  for (const auto& [file, index] : tuples) slots.push_back({file, index});
  return slots;
}

// As io_engine's IoError, the Python class is looked up when first needed. Which parameter the page holds is for the
// side that knows tensors to say.
void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const pages::CorruptPage& error) {
    const py::object type = py::module_::import("angelptm.errors").attr("CorruptPageError");
    const py::object instance = type(error.page, "", error.path, error.offset, error.expected, error.found);
    PyErr_SetObject(type.ptr(), instance.ptr());
  }
}

void bind_store(py::module_& module) {
  py::enum_<Home>(module, "Home").value("HOST", Home::kHost).value("SSD", Home::kSsd);
  py::enum_<pages::Captured::State>(module, "Captured")
      .value("ZEROS", pages::Captured::State::kZeros)
      .value("IN_SLOT", pages::Captured::State::kInSlot)
      .value("UNSAVED", pages::Captured::State::kUnsaved);

  py::class_<Store>(module, "Store")
      .def(py::init([](std::uint64_t page_bytes, std::uint32_t host_frames,
                       const std::vector<std::tuple<std::string, std::uint32_t, double>>& files, io::Backend backend,
                       std::size_t queue_depth, bool direct, double deadline_seconds,
                       std::optional<io::FaultPlan> faults, bool keep_files) {
             std::vector<StoreFile> specs;
             for (const auto& [path, slots, weight] : files) specs.push_back({path, slots, weight});
             return std::make_unique<Store>(
                 page_bytes, host_frames, specs, keep_files ? pages::Naming::kKept : pages::Naming::kUnlinked,
                 pages::IoOptions{backend, queue_depth, direct, deadline_seconds, std::move(faults)});
           }),
           py::arg("page_bytes"), py::arg("host_frames"), py::arg("files"), py::kw_only(),
           py::arg("backend") = io::Backend::kAuto, py::arg("queue_depth") = 16, py::arg("direct") = true,
           py::arg("deadline_seconds") = 120.0, py::arg("faults") = std::nullopt, py::arg("keep_files") = false,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "add_page",
          [](Store& store, Home home, std::uint32_t used_bytes) { return store.table().add(home, used_bytes); },
          py::arg("home"), py::arg("used_bytes"))
      .def(
          "add_page_at",
          [](Store& store, std::uint64_t address, std::uint32_t used_bytes) {
            return store.table().add_at(reinterpret_cast<std::byte*>(address), used_bytes);
          },
          py::arg("address"), py::arg("used_bytes"))
      .def("page_version", [](Store& store, PageId page) { return store.table().info(page).version; })
      .def("page_home", [](Store& store, PageId page) { return store.table().info(page).home; })
      .def("home_address",
           [](Store& store, PageId page) {
             const pages::PageInfo info = store.table().info(page);
             if (info.home != Home::kHost) throw std::invalid_argument("page does not live in the host tier");
             return integer(store.table().address(info));
           })
      // [(frame, version), ...]: the pages' newest content, which stays there until release_held.
      .def("hold",
           [](Store& store, const std::vector<PageId>& ids) {
             for (const PageId page : ids) {  // before any is held
               const pages::PageInfo info = store.table().info(page);
               if (info.home != Home::kHost || info.fixed != nullptr)
                 throw std::invalid_argument("a page that is held lives in the host pool");
             }
             std::vector<std::pair<pages::Frame, std::uint32_t>> held;
             for (const PageId page : ids) {
               const pages::HeldFrame now = store.table().hold(page);
               held.emplace_back(now.frame, now.version);
             }
             return held;
           })
      .def("release_held",
           [](Store& store, const std::vector<pages::Frame>& frames) {
             for (const pages::Frame frame : frames) {
               if (frame >= store.host().frame_count() || store.host().readers(frame) == 0)
                 throw std::invalid_argument("frame " + std::to_string(frame) + " is not held");
               store.host().release_reader(frame);
             }
           })
      .def("publish_in_place", [](Store& store, PageId page) { store.table().publish_in_place(page); })
      .def(
          "discard", [](Store& store, PageId page) { store.mover().discard(page); },
          py::call_guard<py::gil_scoped_release>())
      .def("page_written", [](Store& store, PageId page) { return store.table().info(page).written; })
      .def_property_readonly("slot_counts",
                             [](Store& store) {
                               std::vector<std::uint32_t> counts;
                               for (const auto& file : store.slots().files()) counts.push_back(file.slot_count);
                               return counts;
                             })
      .def("claim_slots",
           [](Store& store, const std::vector<SlotTuple>& slots) { store.slots().claim(to_slots(slots)); })
      .def("release_slots",
           [](Store& store, const std::vector<SlotTuple>& slots) {
             for (const pages::Slot slot : to_slots(slots)) store.slots().release(slot);
           })
      .def("slot_reference_count", [](Store& store, std::uint32_t file,
                                      std::uint32_t index) { return store.slots().reference_count({file, index}); })
      .def(
          "capture",
          [](Store& store, const std::vector<PageId>& ids) {
            std::vector<std::tuple<pages::Captured::State, std::uint32_t, std::uint32_t, std::uint32_t, std::uint64_t>>
                found;
            for (const pages::Captured& page : store.table().capture(ids))
              found.emplace_back(page.state, page.slot.file, page.slot.index, page.crc, page.version);
            return found;
          },
          py::arg("pages"))
      .def(
          "adopt",
          [](Store& store, PageId page, std::uint32_t file, std::uint32_t index, std::uint32_t crc,
             std::uint64_t version) { store.mover().adopt(page, {file, index}, crc, version); },
          py::arg("page"), py::arg("file"), py::arg("index"), py::arg("crc"), py::arg("version"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "probe_drive",
          [](Store& store, double seconds) -> py::object {
            std::optional<pages::DriveRates> found;
            {
              py::gil_scoped_release release;
              found = pages::probe_drive(store, seconds);
            }
            if (!found) return py::none();
            py::dict rates;
            rates["read_bytes_per_s"] = found->read_bytes_per_s;
            rates["write_bytes_per_s"] = found->write_bytes_per_s;
            rates["mixed_bytes_per_s"] = found->mixed_bytes_per_s;
            rates["latency_seconds"] = found->latency_seconds;
            rates["slots"] = found->slots;
            rates["moved_bytes"] = found->moved_bytes;
            return rates;
          },
          py::arg("seconds"))
      .def("drive_use",
           [](const Store& store) {
             const auto totals = store.meter().totals();
             py::dict found;
             for (std::size_t i = 0; i < totals.size(); ++i)
               found[std::array{"read", "write", "mixed"}[i]] = std::pair(totals[i].bytes, totals[i].seconds);
             return found;
           })
      .def("make_saver", &Store::make_saver, py::keep_alive<0, 1>(), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("page_bytes", [](Store& store) { return store.host().page_bytes(); })
      .def_property_readonly("page_count", [](Store& store) { return store.table().page_count(); })
      .def_property_readonly("host_address", [](Store& store) { return integer(store.host().base()); })
      .def_property_readonly("host_frame_count", [](Store& store) { return store.host().frame_count(); })
      .def_property_readonly("host_used_count", [](Store& store) { return store.host().used_count(); })
      .def_property_readonly("host_peak_count", [](Store& store) { return store.host().peak_count(); })
      .def_property_readonly("slot_count", [](Store& store) { return store.slots().slot_count(); })
      .def_property_readonly("slot_free_count",
                             [](Store& store) { return store.slots().slot_count() - store.slots().used_count(); })
      .def_property_readonly("slot_used_count", [](Store& store) { return store.slots().used_count(); })
      .def_property_readonly("slot_peak_count", [](Store& store) { return store.slots().peak_count(); })
      .def_property_readonly("ssd_page_peak_count", [](Store& store) { return store.table().ssd_peak_count(); })
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

void bind_fetcher(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using pages::Fetcher;
  py::class_<Fetcher>(module, "Fetcher")
      .def(py::init([](Store& store, std::size_t most_frames, const py::object& /*memory*/,
                       std::shared_ptr<device::CopyStream> stream) {
             return std::make_unique<Fetcher>(store.table(), store.make_engine(), &store.mover(), most_frames,
                                              store.options().deadline_seconds, std::move(stream));
           }),
           // memory: whatever owns the addresses that are fetched to; it lives as long as the thread that writes there
           py::arg("store"), py::arg("most_frames"), py::arg("memory") = py::none(), py::arg("stream") = nullptr,
           py::keep_alive<1, 2>(), py::keep_alive<1, 4>())
      // items: [(page, address that gets its content), ...]
      .def(
          "fetch",
          [](Fetcher& fetcher, std::string what, const std::vector<std::pair<PageId, std::uint64_t>>& items,
             std::shared_ptr<Ticket> after, bool urgent, std::uint64_t computed) {
            std::vector<pages::FetchItem> found;
            found.reserve(items.size());
            for (const auto& [page, to] : items) found.push_back({page, reinterpret_cast<std::byte*>(to)});
            return fetcher.fetch(std::move(what), std::move(found), std::move(after), urgent, computed);
          },
          py::arg("what"), py::arg("items"), py::kw_only(), py::arg("after") = nullptr, py::arg("urgent") = false,
          py::arg("computed") = 0, Release())
      // The same from frames that the caller holds: [(page, address, frame), ...]. With `release` the holds go with it.
      .def(
          "fetch_held",
          [](Fetcher& fetcher, std::string what,
             const std::vector<std::tuple<PageId, std::uint64_t, pages::Frame>>& items, bool release, bool urgent,
             std::uint64_t computed) {
            std::vector<pages::FetchItem> found;
            found.reserve(items.size());
            for (const auto& [page, to, frame] : items)
              found.push_back({page, reinterpret_cast<std::byte*>(to), frame, release});
            return fetcher.fetch(std::move(what), std::move(found), nullptr, urgent, computed);
          },
          py::arg("what"), py::arg("items"), py::kw_only(), py::arg("release"), py::arg("urgent") = false,
          py::arg("computed") = 0, Release())
      .def("read_ahead", &Fetcher::read_ahead, py::arg("pages"), Release())
      .def("let_go", &Fetcher::let_go, Release())
      .def_property_readonly("totals", [](const Fetcher& fetcher) {
        const pages::FetchTotals now = fetcher.totals();
        py::dict facts;
        facts["copied_bytes"] = now.copied_bytes;
        facts["handed_over_bytes"] = now.handed_over_bytes;
        facts["copy_seconds"] = now.copy_seconds;
        facts["read_bytes"] = now.io.read_bytes;
        return facts;
      });
}

void bind_saver(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using pages::PageSaver;
  py::class_<PageSaver>(module, "PageSaver")
      .def("save", &PageSaver::save, py::arg("pages"), Release())
      .def(
          "save_bytes",
          [](PageSaver& saver, std::uint64_t address, std::uint32_t bytes) {
            std::uint32_t crc = 0;
            const pages::Slot slot = saver.save_bytes(reinterpret_cast<const std::byte*>(address), bytes, crc);
            return std::make_tuple(slot.file, slot.index, crc);
          },
          py::arg("address"), py::arg("bytes"), Release())
      .def("flush", &PageSaver::flush, Release())
      .def_property_readonly("written_bytes", py::cpp_function(&PageSaver::written_bytes, Release()));
}

}  // namespace

void bind_pages(py::module_& module) {
  py::register_local_exception_translator(&translate);
  py::register_exception<pages::StoppedError>(module, "StoppedError", PyExc_RuntimeError);
  py::register_exception<pages::TierCapacityError>(module, "TierCapacityError", PyExc_RuntimeError);
  py::register_exception<DeadlineError>(module, "DeadlineError", PyExc_TimeoutError);
  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket")
      .def("done", &Ticket::done)
      .def("wait", &Ticket::wait, py::arg("deadline_seconds"), py::call_guard<py::gil_scoped_release>());
  bind_store(module);
  bind_mover(module);
  bind_fetcher(module);
  bind_saver(module);
  module.def(
      "copy_bytes",
      [](std::uint64_t to, std::uint64_t from, std::uint64_t bytes) {
        std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
      },
      py::arg("to"), py::arg("from_"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  module.def(
      "fill_zero",
      [](std::uint64_t address, std::uint64_t bytes) { std::memset(reinterpret_cast<void*>(address), 0, bytes); },
      py::arg("address"), py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace angelptm
