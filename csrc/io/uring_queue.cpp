// The kernel's io_uring interface, spoken directly: two rings shared with the
// kernel, one system call to submit a batch and one to wait. See
// io_uring_setup(2), io_uring_enter(2) and io_uring_register(2).
#include "io/queue.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif

#include <cerrno>

// The newest thing needed of the headers is waiting with a timeout (Linux 5.11).
#if defined(IORING_FEAT_EXT_ARG)

#include <linux/time_types.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace angelptm::io {

namespace {

// Values of newer headers, so that a build on an old one still uses them where the running kernel knows them.
constexpr unsigned kSetupCoopTaskrun = 1U << 8;                       // IORING_SETUP_COOP_TASKRUN, Linux 5.19
constexpr unsigned kSetupTaskrunFlag = 1U << 9;                       // IORING_SETUP_TASKRUN_FLAG, Linux 5.19
constexpr unsigned kQueueCqOverflow = 1U << 1;                        // IORING_SQ_CQ_OVERFLOW
constexpr unsigned kQueueTaskrun = 1U << 2;                           // IORING_SQ_TASKRUN
constexpr std::uint64_t kMostBytesOfBuffer = std::uint64_t{1} << 30;  // the kernel's limit for one registered buffer

std::string message_of(int error) { return std::generic_category().message(error); }

[[noreturn]] void setup_failed(int error, const std::string& detail) {
  throw IoError(Op::kSetup, "", 0, 0, error, detail);
}

// Owns one shared mapping of the ring.
class Mapping {
 public:
  Mapping() = default;
  Mapping(int descriptor, std::uint64_t offset, std::size_t bytes) : bytes_(bytes) {
    address_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor,
                      static_cast<off_t>(offset));
    if (address_ == MAP_FAILED) {
      address_ = nullptr;
      setup_failed(errno, "io_uring: mmap of the rings");
    }
  }
  Mapping(Mapping&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(address_, other.address_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Mapping() {
    if (address_ != nullptr) ::munmap(address_, bytes_);
  }
  template <typename T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(address_) + offset);
  }

 private:
  void* address_ = nullptr;
  std::size_t bytes_ = 0;
};

class Descriptor {
 public:
  Descriptor() = default;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int value = -1;
};

class UringQueue final : public Queue {
 public:
  UringQueue(std::vector<std::shared_ptr<const File>> files, std::vector<Region> regions, std::size_t depth)
      : files_(std::move(files)), depth_(depth) {
    if (depth == 0) throw std::invalid_argument("depth must be positive");
    set_up();
    register_files();
    register_buffers(regions);
  }

  const char* name() const override { return "uring"; }
  std::size_t depth() const override { return depth_; }
  std::string notes() const override { return notes_; }

  std::size_t submit(std::span<const Attempt> attempts) override {
    const std::size_t count = std::min(attempts.size(), depth_ - in_flight_);
    if (count == 0) return 0;
    // Only this side writes the tail, so its own last value may be read relaxed.
    const std::uint32_t tail = std::atomic_ref(*sq_tail_).load(std::memory_order_relaxed);
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t slot = (tail + static_cast<std::uint32_t>(i)) & sq_mask_;
      fill(sqes_[slot], attempts[i]);
      sq_array_[slot] = slot;
    }
    // Release: the entries are written before the kernel, which reads the tail with acquire, can see the new tail.
    std::atomic_ref(*sq_tail_).store(tail + static_cast<std::uint32_t>(count), std::memory_order_release);
    int result;
    do {
      result = enter(static_cast<unsigned>(count), 0, 0, nullptr);
    } while (result < 0 && errno == EINTR);
    const int error = result < 0 ? errno : 0;
    const std::size_t taken = result < 0 ? 0 : static_cast<std::size_t>(result);
    // The kernel reads the tail only inside enter (no SQPOLL thread here), so what it did not take can be withdrawn.
    if (taken < count) {
      std::atomic_ref(*sq_tail_).store(tail + static_cast<std::uint32_t>(taken), std::memory_order_release);
    }
    in_flight_ += taken;
    // EAGAIN: no memory for a request now; EBUSY: completions must be reaped first. Both pass.
    if (error != 0 && error != EAGAIN && error != EBUSY) setup_failed(error, "io_uring_enter to submit");
    return taken;
  }

  std::size_t reap(std::vector<Answer>& answers, std::size_t at_least, Clock::time_point deadline) override {
    const std::size_t wanted = std::min(at_least, in_flight_);
    std::size_t count = drain(answers);
    // Completions may wait for this task to enter the kernel (cooperative task running), or, were the ring ever full,
    // in the kernel's overflow list. The flag is a hint that the kernel sets at any time: relaxed, since the entries
    // themselves are ordered by the completion tail.
    const unsigned pending = kQueueTaskrun | kQueueCqOverflow;
    if (count < wanted || (std::atomic_ref(*sq_flags_).load(std::memory_order_relaxed) & pending) != 0) {
      do {
        const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - Clock::now()).count();
        const bool may_wait = count < wanted && left > 0;
        __kernel_timespec timeout{};
        if (may_wait) {
          timeout.tv_sec = left / 1'000'000'000;
          timeout.tv_nsec = left % 1'000'000'000;
        }
        const auto missing = static_cast<unsigned>(may_wait ? wanted - count : 0);
        const int result = enter(0, missing, IORING_ENTER_GETEVENTS, may_wait ? &timeout : nullptr);
        const int error = result < 0 ? errno : 0;
        count += drain(answers);
        if (error != 0 && error != EINTR && error != ETIME && error != EAGAIN && error != EBUSY) {
          setup_failed(error, "io_uring_enter to wait");
        }
        if (!may_wait) break;
      } while (count < wanted);
    }
    return count;
  }

 private:
  void set_up() {
    io_uring_params params{};
    // COOP_TASKRUN: completions do not interrupt this task while it computes. Not SINGLE_ISSUER or DEFER_TASKRUN: those
    // bind the ring to one task, and an engine is made in one thread and used in another.
    for (const unsigned flags : {kSetupCoopTaskrun | kSetupTaskrunFlag, 0U}) {
      params = {};
      params.flags = flags;
      ring_.value = static_cast<int>(::syscall(SYS_io_uring_setup, static_cast<unsigned>(depth_), &params));
      if (ring_.value >= 0 || errno != EINVAL) break;
    }
    if (ring_.value < 0) {
      const int error = errno;
      std::string detail = "io_uring_setup";
      if (error == ENOSYS) detail = "this kernel has no io_uring";
      if (error == EPERM) detail = "io_uring is forbidden here (sysctl kernel.io_uring_disabled or a seccomp filter)";
      if (error == ENOMEM) detail = "io_uring_setup: memory for the rings exceeds RLIMIT_MEMLOCK";
      setup_failed(error, detail);
    }
    const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_EXT_ARG;
    if ((params.features & needed) != needed) setup_failed(ENOSYS, "this kernel's io_uring is older than Linux 5.11");
    const std::size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(std::uint32_t);
    const std::size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
    rings_ = Mapping(ring_.value, IORING_OFF_SQ_RING, std::max(sq_bytes, cq_bytes));
    entries_ = Mapping(ring_.value, IORING_OFF_SQES, params.sq_entries * sizeof(io_uring_sqe));
    sqes_ = entries_.at<io_uring_sqe>(0);
    sq_tail_ = rings_.at<std::uint32_t>(params.sq_off.tail);
    sq_flags_ = rings_.at<std::uint32_t>(params.sq_off.flags);
    sq_array_ = rings_.at<std::uint32_t>(params.sq_off.array);
    sq_mask_ = *rings_.at<std::uint32_t>(params.sq_off.ring_mask);
    cq_head_ = rings_.at<std::uint32_t>(params.cq_off.head);
    cq_tail_ = rings_.at<std::uint32_t>(params.cq_off.tail);
    cq_mask_ = *rings_.at<std::uint32_t>(params.cq_off.ring_mask);
    cqes_ = rings_.at<io_uring_cqe>(params.cq_off.cqes);
    // At most depth_ attempts are in flight, and the kernel rounds up: neither ring can overflow.
    if (params.sq_entries < depth_ || params.cq_entries < depth_) setup_failed(EINVAL, "io_uring rings are too small");
  }

  void register_files() {
    if (files_.empty()) return;
    std::vector<int> descriptors;
    for (const auto& file : files_) descriptors.push_back(file->descriptor());
    files_registered_ = ::syscall(SYS_io_uring_register, ring_.value, IORING_REGISTER_FILES, descriptors.data(),
                                  static_cast<unsigned>(descriptors.size())) == 0;
    if (!files_registered_) add_note("files not registered: " + message_of(errno));
  }

  void register_buffers(const std::vector<Region>& regions) {
    std::vector<iovec> pieces;
    std::uint64_t bytes = 0;
    for (const Region& region : regions) {
      for (std::uint64_t done = 0; done < region.bytes; done += kMostBytesOfBuffer) {
        pieces.push_back({region.address + done, std::min(kMostBytesOfBuffer, region.bytes - done)});
      }
      bytes += region.bytes;
    }
    if (pieces.empty()) return;
    std::sort(pieces.begin(), pieces.end(), [](const iovec& a, const iovec& b) { return a.iov_base < b.iov_base; });
    if (::syscall(SYS_io_uring_register, ring_.value, IORING_REGISTER_BUFFERS, pieces.data(),
                  static_cast<unsigned>(pieces.size())) == 0) {
      registered_ = std::move(pieces);
      return;
    }
    const int error = errno;
    // ENOMEM and EPERM: the lock limit; EOPNOTSUPP: file-backed memory. Plain reads and writes work all the same.
    if (error != ENOMEM && error != EPERM && error != EOPNOTSUPP) setup_failed(error, "io_uring: registering buffers");
    rlimit limit{};
    std::string note = "buffers not registered: " + message_of(error) + " for " + std::to_string(bytes) + " bytes";
    if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
      note += ", RLIMIT_MEMLOCK is " + std::to_string(limit.rlim_cur) + " bytes";
    }
    add_note(note);
  }

  void add_note(const std::string& note) { notes_ += (notes_.empty() ? "" : "; ") + note; }

  // Index of the registered piece that holds all of the attempt's buffer, or -1.
  int registered_index(const Attempt& attempt) const {
    auto after = std::upper_bound(registered_.begin(), registered_.end(), static_cast<void*>(attempt.buffer),
                                  [](void* address, const iovec& piece) { return address < piece.iov_base; });
    if (after == registered_.begin()) return -1;
    const iovec& piece = *--after;
    const std::byte* end = static_cast<std::byte*>(piece.iov_base) + piece.iov_len;
    return attempt.buffer + attempt.bytes <= end ? static_cast<int>(after - registered_.begin()) : -1;
  }

  void fill(io_uring_sqe& entry, const Attempt& attempt) const {
    std::memset(&entry, 0, sizeof(entry));
    const int piece = attempt.op == Op::kSync ? -1 : registered_index(attempt);
    const bool read = attempt.op == Op::kRead;
    if (attempt.op == Op::kSync) {
      entry.opcode = IORING_OP_FSYNC;
      entry.fsync_flags = IORING_FSYNC_DATASYNC;
    } else if (piece >= 0) {
      entry.opcode = read ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
      entry.buf_index = static_cast<std::uint16_t>(piece);
    } else {
      entry.opcode = read ? IORING_OP_READ : IORING_OP_WRITE;
    }
    if (files_registered_) {
      entry.flags = IOSQE_FIXED_FILE;
      entry.fd = attempt.file;
    } else {
      entry.fd = files_[static_cast<std::size_t>(attempt.file)]->descriptor();
    }
    entry.off = attempt.offset;
    entry.addr = reinterpret_cast<std::uintptr_t>(attempt.buffer);
    entry.len = attempt.bytes;
    entry.user_data = attempt.id;
  }

  std::size_t drain(std::vector<Answer>& answers) {
    const std::uint32_t head = std::atomic_ref(*cq_head_).load(std::memory_order_relaxed);  // only this side writes it
    // Acquire pairs with the kernel's release of the tail: entries below it are complete.
    const std::uint32_t tail = std::atomic_ref(*cq_tail_).load(std::memory_order_acquire);
    for (std::uint32_t i = head; i != tail; ++i) {
      const io_uring_cqe& entry = cqes_[i & cq_mask_];
      answers.push_back({entry.user_data, entry.res});
    }
    // Release: the entries have been read before the kernel, which acquires the head, may use their places again.
    std::atomic_ref(*cq_head_).store(tail, std::memory_order_release);
    const std::size_t count = tail - head;
    in_flight_ -= count;
    return count;
  }

  int enter(unsigned to_submit, unsigned at_least, unsigned flags, const __kernel_timespec* timeout) const {
    io_uring_getevents_arg argument{};
    if (timeout == nullptr) {
      return static_cast<int>(::syscall(SYS_io_uring_enter, ring_.value, to_submit, at_least, flags, nullptr, 0));
    }
    argument.ts = reinterpret_cast<std::uintptr_t>(timeout);
    return static_cast<int>(::syscall(SYS_io_uring_enter, ring_.value, to_submit, at_least,
                                      flags | IORING_ENTER_EXT_ARG, &argument, sizeof(argument)));
  }

  const std::vector<std::shared_ptr<const File>> files_;
  const std::size_t depth_;
  std::size_t in_flight_ = 0;  // taken by the kernel and not yet drained
  std::string notes_;
  bool files_registered_ = false;
  std::vector<iovec> registered_;  // by address; the position is the kernel's buffer index
  // Destroyed in reverse order: the mappings before the descriptor.
  Descriptor ring_;
  Mapping rings_, entries_;
  io_uring_sqe* sqes_ = nullptr;
  std::uint32_t *sq_tail_ = nullptr, *sq_flags_ = nullptr, *sq_array_ = nullptr;
  std::uint32_t *cq_head_ = nullptr, *cq_tail_ = nullptr;
  std::uint32_t sq_mask_ = 0, cq_mask_ = 0;
  io_uring_cqe* cqes_ = nullptr;
};

}  // namespace

std::unique_ptr<Queue> make_uring_queue(std::vector<std::shared_ptr<const File>> files, std::vector<Region> regions,
                                        std::size_t depth) {
  return std::make_unique<UringQueue>(std::move(files), std::move(regions), depth);
}

}  // namespace angelptm::io

#else  // no usable linux/io_uring.h

namespace angelptm::io {

std::unique_ptr<Queue> make_uring_queue(std::vector<std::shared_ptr<const File>>, std::vector<Region>, std::size_t) {
  throw IoError(Op::kSetup, "", 0, 0, ENOSYS, "built without io_uring: linux/io_uring.h was absent or older than 5.11");
}

}  // namespace angelptm::io

#endif
