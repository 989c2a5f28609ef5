#include "pages/store.h"

#include <algorithm>
#include <stdexcept>

namespace angelptm::pages {

namespace {

// Transfers are whole sectors of 4096 bytes, so a page that is not would run over its frame and its slot.
std::uint64_t checked_page_bytes(std::uint64_t page_bytes) {
  if (page_bytes == 0 || page_bytes % 4096 != 0 || page_bytes > (std::uint64_t{1} << 30))
    throw std::invalid_argument("page_bytes must be a multiple of 4096 and at most 1 GiB, not " +
                                std::to_string(page_bytes));
  return page_bytes;
}

std::vector<SlotFile> open_files(std::uint64_t page_bytes, const std::vector<StoreFile>& files, bool direct,
                                 bool unlink, std::vector<std::string>& notes) {
  std::vector<SlotFile> opened;
  for (const StoreFile& file : files) {
    auto handle = io::File::open(
        file.path,
        {.create = true, .direct = direct, .unlink = unlink, .allocate_bytes = page_bytes * file.slot_count});
    if (!handle->direct()) notes.push_back(file.path + ": buffered I/O, because " + handle->buffered_reason());
    opened.push_back({std::move(handle), file.slot_count, file.weight});
  }
  return opened;
}

}  // namespace

Store::Store(std::uint64_t page_bytes, std::uint32_t host_frames, const std::vector<StoreFile>& files, Naming naming,
             IoOptions options)
    : options_(std::move(options)),
      host_(checked_page_bytes(page_bytes), host_frames),
      slots_(page_bytes, open_files(page_bytes, files, options_.direct, naming == Naming::kUnlinked, notes_)),
      table_(host_, slots_),
      mover_(std::make_unique<PageMover>(table_, make_engine(), options_.deadline_seconds)) {}

std::unique_ptr<io::Engine> Store::make_engine(Use use) {
  std::vector<std::shared_ptr<const io::File>> files;
  for (const SlotFile& file : slots_.files()) files.push_back(file.file);
  std::vector<io::Region> regions;
  if (host_.frame_count() > 0 && !files.empty())
    regions.push_back({host_.base(), host_.page_bytes() * host_.frame_count()});
  std::string because;
  const bool runs = use == Use::kRun;
  auto engine =
      io::make_engine(options_.backend, std::move(files), std::move(regions), options_.queue_depth,
                      runs && options_.faults ? &*options_.faults : nullptr, &because, 30, runs ? meter_ : nullptr);
  for (const std::string& note : {because, engine->queue().notes()})
    if (!note.empty() && std::find(notes_.begin(), notes_.end(), note) == notes_.end()) notes_.push_back(note);
  return engine;
}

std::unique_ptr<PageSaver> Store::make_saver() {
  return std::make_unique<PageSaver>(table_, make_engine(), options_.deadline_seconds);
}

}  // namespace angelptm::pages
