#include "io/crash_plan.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>

namespace angelptm::io {

namespace {

static_assert(std::endian::native == std::endian::little, "the journal is little-endian");

constexpr std::uint32_t kSectorBytes = 512;
constexpr std::size_t kPageBytes = 4096;  // satisfies every O_DIRECT memory alignment in use

struct Freed {
  void operator()(std::byte* address) const { std::free(address); }
};
using AlignedBytes = std::unique_ptr<std::byte, Freed>;

struct RecordHeader {
  std::array<char, 4> magic{'A', 'P', 'T', 'J'};
  std::uint32_t kind = 0;
  std::uint64_t record_bytes = 0, number = 0, inode = 0, offset = 0, length = 0;
};
static_assert(sizeof(RecordHeader) == 48);

// All of [offset, offset + bytes); what lies behind the end of the file is zeros.
AlignedBytes read_former(const File& file, std::uint64_t offset, std::size_t bytes) {
  const std::size_t capacity = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  AlignedBytes content(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, capacity)));
  if (content == nullptr) throw IoError(Op::kRead, file.path(), offset, bytes, ENOMEM, "its former content");
  std::size_t done = 0;
  while (done < bytes) {
    const ssize_t count =
        ::pread(file.descriptor(), content.get() + done, bytes - done, static_cast<off_t>(offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw IoError(Op::kRead, file.path(), offset + done, bytes - done, errno, "its former content");
    done += static_cast<std::size_t>(count);
    // An end off the alignment also ends it: O_DIRECT could not go on from there.
    if (count == 0 || static_cast<std::size_t>(count) % file.offset_alignment() != 0) break;
  }
  std::memset(content.get() + done, 0, bytes - done);
  return content;
}

}  // namespace

CrashPlan::CrashPlan(std::uint64_t seed, std::uint64_t kill_at, const std::string& journal)
    : seed_(seed), kill_at_(kill_at), journal_path_(journal) {
  if (journal.empty()) return;
  journal_ = ::open(journal.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (journal_ < 0) throw IoError(Op::kOpen, journal, 0, 0, errno);
}

CrashPlan::~CrashPlan() {
  if (journal_ >= 0) ::close(journal_);
}

std::uint64_t CrashPlan::count() const {
  const std::lock_guard lock(mutex_);
  return count_;
}

std::uint64_t CrashPlan::begin(const Attempt& attempt, const File& file) {
  if (attempt.op != Op::kWrite && attempt.op != Op::kSync) return 0;
  const std::lock_guard lock(mutex_);
  const std::uint64_t number = ++count_;
  if (journal_ >= 0) {
    struct stat status{};
    if (::fstat(file.descriptor(), &status) != 0) throw IoError(Op::kOpen, file.path(), 0, 0, errno, "fstat");
    const FileId id{status.st_dev, status.st_ino};
    if (attempt.op == Op::kWrite) {
      append_former_content(attempt, file, number, id);
      undurable_[number] = {id, false};
    } else {
      std::vector<std::uint64_t>& covered = covered_[number];
      for (const auto& [earlier, write] : undurable_) {
        if (write.completed && write.file == id) covered.push_back(earlier);
      }
    }
  }
  if (number == kill_at_) kill_process(attempt, file, number);
  return number;
}

void CrashPlan::end(std::uint64_t number, std::int32_t result) {
  if (number == 0 || journal_ < 0) return;
  const std::lock_guard lock(mutex_);
  finish(number, result);
}

void CrashPlan::finish(std::uint64_t number, std::int32_t result) {
  // A write that failed may have reached the disk in part, so it counts as one: the next sync settles what is there.
  if (const auto write = undurable_.find(number); write != undurable_.end()) write->second.completed = true;
  const auto sync = covered_.find(number);
  if (sync == covered_.end()) return;
  std::vector<std::uint64_t> durable = std::move(sync->second);
  covered_.erase(sync);
  if (result < 0) return;
  std::erase_if(durable, [&](std::uint64_t write) { return undurable_.erase(write) == 0; });
  if (durable.empty()) return;
  if (undurable_.empty()) {
    forget_if_all_durable();
    return;
  }
  append(Kind::kDurable, number, 0, 0, durable.size(), durable.data(), durable.size() * sizeof(durable[0]), nullptr, 0);
}

void CrashPlan::withdraw(std::uint64_t number) {
  if (number == 0 || journal_ < 0) return;
  const std::lock_guard lock(mutex_);
  covered_.erase(number);
  if (undurable_.erase(number) == 0) return;
  append(Kind::kWithdrawn, number, 0, 0, 0, nullptr, 0, nullptr, 0);
  forget_if_all_durable();
}

void CrashPlan::forget_if_all_durable() {
  if (!undurable_.empty()) return;
  if (::ftruncate(journal_, 0) != 0) throw IoError(Op::kWrite, journal_path_, 0, 0, errno, "emptying the journal");
}

void CrashPlan::kill_process(const Attempt& attempt, const File& file, std::uint64_t number) {
  std::seed_seq seeds{seed_ & 0xffffffffu, seed_ >> 32, number & 0xffffffffu, number >> 32};
  std::mt19937_64 generator(seeds);
  const std::uint64_t moment = generator() % 3, place = generator();
  // A direct write is cut at the file's alignment, which is a sector or more; a buffered one at a sector.
  const std::uint32_t grain = std::max(kSectorBytes, file.offset_alignment());
  const std::uint32_t grains = attempt.bytes / grain;
  ssize_t result = 0;
  if (attempt.op == Op::kSync) {
    if (moment != 0) {
      result = ::fdatasync(file.descriptor());
      finish(number, result == 0 ? 0 : -errno);
    }
  } else if (moment != 0) {
    std::size_t bytes = attempt.bytes;
    if (moment == 1) bytes = grains < 2 ? 0 : (1 + place % (grains - 1)) * grain;
    result = ::pwrite(file.descriptor(), attempt.buffer, bytes, static_cast<off_t>(attempt.offset));
  }
  static_cast<void>(result);  // the process ends here, however that went
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}

void CrashPlan::append_former_content(const Attempt& attempt, const File& file, std::uint64_t number,
                                      const FileId& id) {
  const AlignedBytes content = read_former(file, attempt.offset, attempt.bytes);
  const std::string path = std::filesystem::absolute(file.path()).string();  // the reader has another folder
  append(Kind::kWrite, number, id.second, attempt.offset, path.size(), path.data(), path.size(), content.get(),
         attempt.bytes);
}

void CrashPlan::append(Kind kind, std::uint64_t number, std::uint64_t inode, std::uint64_t offset, std::uint64_t length,
                       const void* head, std::size_t head_bytes, const void* tail, std::size_t tail_bytes) {
  RecordHeader header;
  header.kind = static_cast<std::uint32_t>(kind);
  header.record_bytes = sizeof(header) + head_bytes + tail_bytes;
  header.number = number;
  header.inode = inode;
  header.offset = offset;
  header.length = length;
  const std::array<iovec, 3> pieces{
      {{&header, sizeof(header)}, {const_cast<void*>(head), head_bytes}, {const_cast<void*>(tail), tail_bytes}}};
  const ssize_t written = ::writev(journal_, pieces.data(), static_cast<int>(pieces.size()));
  if (written == static_cast<ssize_t>(header.record_bytes)) return;
  throw IoError(Op::kWrite, journal_path_, 0, header.record_bytes, written < 0 ? errno : ENOSPC, "the crash journal");
}

}  // namespace angelptm::io
