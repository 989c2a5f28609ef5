// The end of the process at a chosen write, and the record that a power cut is simulated from. One plan is shared by
// the fault queues of a process: a kill is of the process, and a sync covers what any queue wrote to the file.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "io/queue.h"

namespace angelptm::io {

// The journal is a row of records, each appended by one write(2); io_engine/power_cut.py reads it. All numbers are
// little-endian. A record that a kill cut short is the last one, and its write was never handed over.
//
//   offset  bytes  what
//        0      4  "APTJ"
//        4      4  kind: 1 write, 2 durable, 3 withdrawn
//        8      8  bytes of this record, these included
//       16      8  number of the write
//       24      8  inode of the file
//       32      8  offset of the write
//       40      8  bytes of the path (write) or count of the numbers (durable)
//       48         write: the path, then the former content; durable: the numbers of the writes, 8 bytes each
//
// It holds every write since the last moment when all was durable, at which it is emptied. Safe to use from several
// threads; they take turns, the reading of former content included.
class CrashPlan {
 public:
  // kill_at: the number of the write or sync, counted from 1, at which the process ends by SIGKILL; 0: never.
  // `seed` chooses whether that is just before it is handed over, after a first part of it, or after its completion.
  // journal: a path, "" for none. A journal that another process left there is emptied. Throws IoError.
  CrashPlan(std::uint64_t seed, std::uint64_t kill_at, const std::string& journal);
  ~CrashPlan();
  CrashPlan(const CrashPlan&) = delete;
  CrashPlan& operator=(const CrashPlan&) = delete;

  // To be called before a queue is given the attempt; returns its number (0 for a read, which is not counted). Throws
  // IoError when the former content cannot be read or written down.
  std::uint64_t begin(const Attempt& attempt, const File& file);
  void end(std::uint64_t number, std::int32_t result);  // its answer arrived
  void withdraw(std::uint64_t number);                  // the queue did not take it, so nothing was written
  std::uint64_t count() const;                          // writes and syncs begun

 private:
  using FileId = std::pair<std::uint64_t, std::uint64_t>;  // device, inode: two Files may be the same file
  struct Write {
    FileId file;
    bool completed;
  };
  enum class Kind : std::uint32_t { kWrite = 1, kDurable = 2, kWithdrawn = 3 };

  [[noreturn]] void kill_process(const Attempt& attempt, const File& file, std::uint64_t number);
  void finish(std::uint64_t number, std::int32_t result);
  void append_former_content(const Attempt& attempt, const File& file, std::uint64_t number, const FileId& id);
  void append(Kind kind, std::uint64_t number, std::uint64_t inode, std::uint64_t offset, std::uint64_t length,
              const void* head, std::size_t head_bytes, const void* tail, std::size_t tail_bytes);
  void forget_if_all_durable();

  const std::uint64_t seed_, kill_at_;
  const std::string journal_path_;
  int journal_ = -1;
  mutable std::mutex mutex_;  // guards what follows, and the journal
  std::uint64_t count_ = 0;
  std::map<std::uint64_t, Write> undurable_;                     // by number
  std::map<std::uint64_t, std::vector<std::uint64_t>> covered_;  // by a sync's number: the writes it makes durable
};

}  // namespace angelptm::io
