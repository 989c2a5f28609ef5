#include "io/crc32c.h"

#include <stdexcept>
#include <string>

#include "io/crc32c_kinds.h"

namespace angelptm::io {
namespace {

// Null if this build lacks the kind; whether the CPU has it is supported()'s question.
Crc32cUpdate* update_of(Crc32cKind kind) {
  switch (kind) {
    case Crc32cKind::kTable:
      return &crc32c_table;
#ifdef ANGELPTM_CRC32C_X86
    case Crc32cKind::kSse42:
      return &crc32c_sse42;
    case Crc32cKind::kAvx512:
      return &crc32c_avx512;
#endif
#ifdef ANGELPTM_CRC32C_ARM
    case Crc32cKind::kArmv8:
      return &crc32c_armv8;
#endif
    default:
      return nullptr;
  }
}

bool supported(Crc32cKind kind) {
  switch (kind) {
    case Crc32cKind::kTable:
      return true;
#ifdef ANGELPTM_CRC32C_X86
    case Crc32cKind::kSse42:
      return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("pclmul");
    case Crc32cKind::kAvx512:
      // Its ends go through kSse42.
      return supported(Crc32cKind::kSse42) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
#endif
#ifdef ANGELPTM_CRC32C_ARM
    case Crc32cKind::kArmv8:
      return has_armv8_crc();
#endif
    default:
      return false;
  }
}

Crc32cKind best_kind() {
  static const Crc32cKind kind = crc32c_kinds().back();
  return kind;
}

}  // namespace

std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t seed) {
  static Crc32cUpdate* const update = update_of(best_kind());
  return ~update(~seed, static_cast<const unsigned char*>(data), bytes);
}

const char* crc32c_implementation() { return crc32c_kind_name(best_kind()); }

const char* crc32c_kind_name(Crc32cKind kind) {
  switch (kind) {
    case Crc32cKind::kTable:
      return "table";
    case Crc32cKind::kSse42:
      return "sse4.2";
    case Crc32cKind::kAvx512:
      return "avx512";
    case Crc32cKind::kArmv8:
      return "armv8";
  }
  return "unknown";
}

std::vector<Crc32cKind> crc32c_kinds() {
  std::vector<Crc32cKind> kinds;
  for (const Crc32cKind kind : {Crc32cKind::kTable, Crc32cKind::kSse42, Crc32cKind::kAvx512, Crc32cKind::kArmv8}) {
    if (supported(kind)) kinds.push_back(kind);
  }
  return kinds;
}

std::uint32_t crc32c_with(Crc32cKind kind, const void* data, std::size_t bytes, std::uint32_t seed) {
  if (!supported(kind)) throw std::invalid_argument(std::string("this CPU or build has no ") + crc32c_kind_name(kind));
  return ~update_of(kind)(~seed, static_cast<const unsigned char*>(data), bytes);
}

}  // namespace angelptm::io
