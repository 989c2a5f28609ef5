// A file that pages live in: opened once, with the alignment that the file
// system asks for, and preallocated so that a full disk is met at start and
// not in the middle of a step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace angelptm::io {

struct FileOptions {
  bool create = false;     // create it if it is absent
  bool read_only = false;  // O_RDONLY; implies nothing is preallocated
  bool direct = true;      // ask for O_DIRECT; see File::buffered_reason
  bool unlink = false;     // remove the name at once: the space is given back when the process ends, however it ends
  std::uint64_t allocate_bytes = 0;  // make the file at least this large, blocks reserved; 0 leaves the size alone
};

// Owns the descriptor. Immutable after open, so it may be shared by engines of several threads.
class File {
 public:
  // Throws IoError(open, ...) with errno. When the file system refuses
  // O_DIRECT the file is opened buffered and buffered_reason() says why;
  // nothing is printed here: the caller decides how to warn, once. A file that
  // this call created is removed again when a later part of the call fails.
  static std::shared_ptr<const File> open(const std::string& path, const FileOptions& options);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int descriptor() const { return descriptor_; }
  const std::string& path() const { return path_; }
  bool direct() const { return buffered_reason_.empty(); }
  const std::string& buffered_reason() const { return buffered_reason_; }
  // Empty, or why allocate_bytes could only be checked and not reserved: the
  // file system has no fallocate, so the file was extended with a hole after
  // comparing with the free space, and a full disk is met later as ENOSPC.
  const std::string& allocation_note() const { return allocation_note_; }
  // From statx(STATX_DIOALIGN); 1 when buffered. Addresses, and offsets and
  // lengths, of every request must be multiples of these.
  std::uint32_t memory_alignment() const { return memory_alignment_; }
  std::uint32_t offset_alignment() const { return offset_alignment_; }
  std::uint64_t size_bytes() const;  // as fstat says now; throws IoError

 private:
  File() = default;
  int descriptor_ = -1;
  std::string path_;
  std::string buffered_reason_;
  std::string allocation_note_;
  std::uint32_t memory_alignment_ = 1;
  std::uint32_t offset_alignment_ = 1;
};

}  // namespace angelptm::io
