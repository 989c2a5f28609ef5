// A queue of raw attempts: what the kernel is asked, and what it answered,
// with nothing hidden. A short answer is an answer; resuming and retrying is
// the Engine's work, written once for all queues. That is also why faults are
// injected here: below the code that has to survive them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "io/error.h"
#include "io/file.h"

namespace angelptm::io {

using Clock = std::chrono::steady_clock;

// kSync is fdatasync of the file (offset 0, bytes 0, no buffer), answered with 0. It covers the writes whose answers
// were reaped before it was submitted, and no other: neither the kernel nor a pool of threads orders what is in flight.
struct Attempt {
  std::uint64_t id;  // chosen by the caller, returned in the answer
  Op op;             // kRead, kWrite or kSync
  int file;          // index into the files given at construction
  std::uint64_t offset;
  std::byte* buffer;
  std::uint32_t bytes;  // at most 1 GiB
};

struct Answer {
  std::uint64_t id;
  std::int32_t result;  // bytes transferred (0 for a sync), or -errno
};

// Memory that requests will use, so that a queue may register it with the kernel.
struct Region {
  std::byte* address;
  std::uint64_t bytes;
};

// One thread at a time; its owner serializes.
class Queue {
 public:
  virtual ~Queue() = default;
  virtual const char* name() const = 0;
  virtual std::size_t depth() const = 0;  // most attempts in flight at once
  // Why something that makes it fast is off ("buffers not registered: ENOMEM, RLIMIT_MEMLOCK is 8 MiB"), or empty.
  virtual std::string notes() const { return {}; }
  // Hands over at most depth() - in_flight attempts in one batch; returns how
  // many were taken (0 when full, or when the kernel says EAGAIN/EBUSY). Throws
  // IoError when the queue itself is broken.
  virtual std::size_t submit(std::span<const Attempt> attempts) = 0;
  // Appends answers; waits until at least `at_least` have arrived or the
  // deadline passed. Returns how many were appended. EINTR is handled inside.
  virtual std::size_t reap(std::vector<Answer>& answers, std::size_t at_least, Clock::time_point deadline) = 0;
};

// Throws IoError(kSetup) with the reason when this host cannot (ENOSYS, EPERM, ...).
std::unique_ptr<Queue> make_uring_queue(std::vector<std::shared_ptr<const File>> files, std::vector<Region> regions,
                                        std::size_t depth);
std::unique_ptr<Queue> make_thread_queue(std::vector<std::shared_ptr<const File>> files, std::size_t depth,
                                         std::size_t threads);

class CrashPlan;

// Seeded faults, each with its own probability in [0, 1] for each attempt.
struct FaultPlan {
  std::uint64_t seed = 0;
  double short_transfer = 0;  // ask the kernel for a random multiple of the offset alignment less than the whole
  double eintr = 0;           // answer -EINTR without transferring or syncing
  double eagain = 0;          // answer -EAGAIN without transferring or syncing
  double eio = 0;             // answer -EIO without transferring or syncing
  double enospc = 0;          // writes only: answer -ENOSPC without transferring
  double delay = 0;           // hold the answer back for delay_seconds
  double delay_seconds = 0;
  bool reorder = false;  // shuffle the answers of each reap
  // Kills the process at a chosen write, or records what a power cut would lose; shared by all queues made from copies
  // of this plan. It sees the attempts that are handed to the inner queue, as they are handed over.
  std::shared_ptr<CrashPlan> crash;
};
// `files` are the inner queue's: their alignments say where a transfer may be cut short. The fate of an attempt depends
// on the seed and on how many attempts were taken before it, so the same order of attempts meets the same faults. Syncs
// are counted apart, so that adding one leaves the faults of the transfers where they were.
std::unique_ptr<Queue> make_fault_queue(std::unique_ptr<Queue> inner, std::vector<std::shared_ptr<const File>> files,
                                        const FaultPlan& plan);

}  // namespace angelptm::io
