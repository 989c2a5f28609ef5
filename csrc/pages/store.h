// The tiers below the device, wired together: host pool, slots, page table and
// the engines that serve them. Owns all of it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "io/engine.h"
#include "pages/page_mover.h"
#include "pages/page_saver.h"
#include "pages/page_table.h"

namespace angelptm::pages {

struct StoreFile {
  std::string path;
  std::uint32_t slot_count;
  double weight;
};

enum class Naming : std::uint8_t {
  kUnlinked,  // the files lose their names at once: the space is given back when the process ends, however it ends
  kKept,      // the files stay, and may exist already: their slots hold commits
};

struct IoOptions {
  io::Backend backend = io::Backend::kAuto;
  std::size_t queue_depth = 16;
  bool direct = true;
  double deadline_seconds = 120;
  std::optional<io::FaultPlan> faults;  // tests only
};

class Store {
 public:
  // Opens, or creates, and preallocates the slot files.
  Store(std::uint64_t page_bytes, std::uint32_t host_frames, const std::vector<StoreFile>& files, Naming naming,
        IoOptions options);

  enum class Use : std::uint8_t { kRun, kProbe };
  // An engine over the store's files, with the host pool registered; for one thread. A probe's is not metered, and the
  // faults that tests inject spare it.
  std::unique_ptr<io::Engine> make_engine(Use use = Use::kRun);
  // What the drive gave to all engines of this store together, but to probes.
  const io::DriveMeter& meter() const { return *meter_; }

  HostPool& host() { return host_; }
  SlotMap& slots() { return slots_; }
  PageTable& table() { return table_; }
  PageMover& mover() { return *mover_; }
  std::unique_ptr<PageSaver> make_saver();  // must go before the store
  const IoOptions& options() const { return options_; }
  // One sentence for each fact that makes I/O slower than it could be, or says which backend was chosen and why.
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  IoOptions options_;
  std::shared_ptr<io::DriveMeter> meter_ = std::make_shared<io::DriveMeter>();
  HostPool host_;
  std::vector<std::string> notes_;
  SlotMap slots_;
  PageTable table_;
  std::unique_ptr<PageMover> mover_;
};

}  // namespace angelptm::pages
