// The one error type of byte-level I/O. It carries facts; the text is made from them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace angelptm::io {

enum class Op : std::uint8_t { kRead, kWrite, kOpen, kAllocate, kSync, kSetup };

const char* op_name(Op op);

// errno value that stands for "the file ended before the bytes asked for":
// ENODATA, since read(2) itself has no errno for it.
extern const int kEndOfFile;
// errno value of a wait whose deadline passed: ETIMEDOUT.
extern const int kDeadline;

class IoError : public std::runtime_error {
 public:
  IoError(Op op, std::string path, std::uint64_t offset, std::uint64_t bytes, int error, std::string detail = "");
  Op op;
  std::string path;
  std::uint64_t offset;  // of the first byte not transferred
  std::uint64_t bytes;   // not transferred
  int error;             // errno value, never 0
};

}  // namespace angelptm::io
