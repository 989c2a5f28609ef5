#include "io/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <linux/stat.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <memory>
#include <string>

#include "io/error.h"

namespace angelptm::io {

namespace {

// Asked for where the kernel cannot say: a multiple of every block size in use.
constexpr std::uint32_t kFallbackAlignment = 4096;

int open_retrying(const char* path, int flags) {
  int descriptor;
  do {
    descriptor = ::open(path, flags | O_CLOEXEC, 0644);
  } while (descriptor < 0 && errno == EINTR);
  return descriptor;
}

struct DirectAlignment {
  std::uint32_t memory = kFallbackAlignment;
  std::uint32_t offset = kFallbackAlignment;
  std::string refused;  // why O_DIRECT has no effect on this file, or empty
};

DirectAlignment direct_alignment(int descriptor) {
  DirectAlignment alignment;
  struct statfs system{};
  // Since Linux 6.6 tmpfs accepts O_DIRECT and then ignores it: the pages are DRAM either way.
  if (::fstatfs(descriptor, &system) == 0 && system.f_type == TMPFS_MAGIC) {
    alignment.refused = "tmpfs keeps files in memory, so O_DIRECT has no effect";
    return alignment;
  }
#ifdef STATX_DIOALIGN
  struct ::statx answer{};
  // The raw call, because the C library's struct statx may be older than the kernel's.
  if (::syscall(SYS_statx, descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &answer) == 0 &&
      (answer.stx_mask & STATX_DIOALIGN) != 0) {
    if (answer.stx_dio_mem_align == 0 || answer.stx_dio_offset_align == 0) {
      alignment.refused = "the file system says that this file does not support O_DIRECT";
    } else {
      alignment.memory = answer.stx_dio_mem_align;
      alignment.offset = answer.stx_dio_offset_align;
    }
  }
#endif
  return alignment;
}

// Reserves blocks up to `bytes`; returns a note when they could only be checked. Throws with the size put back.
std::string allocate(int descriptor, const std::string& path, std::uint64_t bytes) {
  if (bytes > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max())) {
    throw IoError(Op::kAllocate, path, 0, bytes, EFBIG);
  }
  struct stat before{};
  if (::fstat(descriptor, &before) != 0) throw IoError(Op::kAllocate, path, 0, bytes, errno);
  // A block device has its space already; its size is found by seeking, since st_size is 0.
  if (S_ISBLK(before.st_mode)) {
    const off_t end = ::lseek(descriptor, 0, SEEK_END);
    if (end < 0) throw IoError(Op::kAllocate, path, 0, bytes, errno);
    if (static_cast<std::uint64_t>(end) < bytes) {
      throw IoError(Op::kAllocate, path, 0, bytes, ENOSPC, "the device has " + std::to_string(end) + " bytes");
    }
    return {};
  }
  // Compared first, because a fallocate that fails has taken the whole disk until it gives up, from everybody.
  struct statvfs space{};
  if (::fstatvfs(descriptor, &space) != 0) throw IoError(Op::kAllocate, path, 0, bytes, errno);
  const std::uint64_t free_bytes = std::uint64_t{space.f_bavail} * space.f_frsize;
  const std::uint64_t owned_bytes = static_cast<std::uint64_t>(before.st_blocks) * 512;  // st_blocks has 512-byte units
  const std::string free_text = "free on this file system: " + std::to_string(free_bytes) + " bytes";
  if (bytes > owned_bytes && bytes - owned_bytes > free_bytes) {
    throw IoError(Op::kAllocate, path, 0, bytes, ENOSPC, free_text);
  }
  int result;
  do {
    result = ::fallocate(descriptor, 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  if (result == 0) return {};
  const int error = errno;
  if (error != EOPNOTSUPP && error != ENOSYS) {
    // It may have come part of the way. Space that it took beyond the old size is given back.
    const bool restored = ::ftruncate(descriptor, before.st_size) == 0;
    throw IoError(Op::kAllocate, path, 0, bytes, error, free_text + (restored ? "" : "; the old size is not restored"));
  }
  // No fallocate here (NFS before 4.2, some FUSE). Not posix_fallocate's emulation, which rewrites a byte of every
  // block.
  if (static_cast<std::uint64_t>(before.st_size) < bytes && ::ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
    throw IoError(Op::kAllocate, path, 0, bytes, errno);
  }
  return "the file system has no fallocate: free space was checked but not reserved";
}

}  // namespace

std::shared_ptr<const File> File::open(const std::string& path, const FileOptions& options) {
  if (path.empty() || path.find('\0') != std::string::npos) throw IoError(Op::kOpen, path, 0, 0, EINVAL, "bad path");
  struct stat status{};
  // Looked at before opening: opening a FIFO would wait for its other end.
  if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode)) {
    throw IoError(Op::kOpen, path, 0, 0, S_ISDIR(status.st_mode) ? EISDIR : EINVAL,
                  "expected a regular file or a block device");
  }
  std::shared_ptr<File> file(new File());
  file->path_ = path;
  const int access = options.read_only ? O_RDONLY : O_RDWR;
  bool created = false;
  if (options.create && !options.read_only) {
    // O_EXCL tells whether the file is ours to remove on failure. O_DIRECT comes later, since an open that is refused
    // for it has created the file all the same.
    const int descriptor = open_retrying(path.c_str(), access | O_CREAT | O_EXCL);
    if (descriptor >= 0) {
      ::close(descriptor);
      created = true;
    } else if (errno != EEXIST) {
      throw IoError(Op::kOpen, path, 0, 0, errno);
    }
  }
  try {
    if (options.direct) {
      file->descriptor_ = open_retrying(path.c_str(), access | O_DIRECT);
      if (file->descriptor_ >= 0) {
        const DirectAlignment alignment = direct_alignment(file->descriptor_);
        file->memory_alignment_ = alignment.memory;
        file->offset_alignment_ = alignment.offset;
        if (!alignment.refused.empty()) {
          file->buffered_reason_ = alignment.refused;
          ::close(file->descriptor_);
          file->descriptor_ = -1;
        }
      } else if (errno == EINVAL || errno == EOPNOTSUPP) {
        file->buffered_reason_ = "the file system refuses O_DIRECT";
      } else {
        throw IoError(Op::kOpen, path, 0, 0, errno);
      }
    } else {
      file->buffered_reason_ = "O_DIRECT was not asked for";
    }
    if (file->descriptor_ < 0) {
      file->memory_alignment_ = file->offset_alignment_ = 1;
      file->descriptor_ = open_retrying(path.c_str(), access);
      if (file->descriptor_ < 0) throw IoError(Op::kOpen, path, 0, 0, errno);
    }
    if (options.allocate_bytes != 0 && !options.read_only) {
      file->allocation_note_ = allocate(file->descriptor_, path, options.allocate_bytes);
    }
    if (options.unlink && ::unlink(path.c_str()) != 0) throw IoError(Op::kOpen, path, 0, 0, errno, "unlink");
  } catch (...) {
    if (created) ::unlink(path.c_str());
    throw;
  }
  return file;
}

File::~File() {
  // close reports write-back errors of buffered data here, but nobody could act on them: durability is fsync's work.
  if (descriptor_ >= 0) ::close(descriptor_);
}

std::uint64_t File::size_bytes() const {
  struct stat status{};
  if (::fstat(descriptor_, &status) != 0) throw IoError(Op::kOpen, path_, 0, 0, errno, "fstat");
  if (S_ISBLK(status.st_mode)) {
    const off_t end = ::lseek(descriptor_, 0, SEEK_END);
    if (end < 0) throw IoError(Op::kOpen, path_, 0, 0, errno, "lseek");
    return static_cast<std::uint64_t>(end);
  }
  return static_cast<std::uint64_t>(status.st_size);
}

}  // namespace angelptm::io
