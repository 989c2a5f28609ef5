#include "io/error.h"

#include <cerrno>
#include <system_error>
#include <utility>

namespace angelptm::io {

const int kEndOfFile = ENODATA;
const int kDeadline = ETIMEDOUT;

const char* op_name(Op op) {
  switch (op) {
    case Op::kRead:
      return "read";
    case Op::kWrite:
      return "write";
    case Op::kOpen:
      return "open";
    case Op::kAllocate:
      return "allocate";
    case Op::kSync:
      return "sync";
    case Op::kSetup:
      return "setup";
  }
  return "unknown";
}

namespace {

// "read /ssd/pages at offset 4096, 8192 bytes: Input/output error (errno 5); <detail>"
std::string text_of(Op op, const std::string& path, std::uint64_t offset, std::uint64_t bytes, int error,
                    const std::string& detail) {
  std::string text = op_name(op);
  if (!path.empty()) text += " " + path;
  if (op == Op::kRead || op == Op::kWrite) text += " at offset " + std::to_string(offset);
  if (bytes != 0) text += ", " + std::to_string(bytes) + " bytes";
  text += ": ";
  if (error == ENODATA) {
    text += "end of file";
  } else if (error == ETIMEDOUT) {
    text += "deadline passed";
  } else {
    // Not strerror: it may write a buffer that other threads share.
    text += std::generic_category().message(error);
  }
  text += " (errno " + std::to_string(error) + ")";
  if (!detail.empty()) text += "; " + detail;
  return text;
}

}  // namespace

IoError::IoError(Op op_in, std::string path_in, std::uint64_t offset_in, std::uint64_t bytes_in, int error_in,
                 std::string detail)
    : std::runtime_error(text_of(op_in, path_in, offset_in, bytes_in, error_in, detail)),
      op(op_in),
      path(std::move(path_in)),
      offset(offset_in),
      bytes(bytes_in),
      error(error_in) {}

}  // namespace angelptm::io
