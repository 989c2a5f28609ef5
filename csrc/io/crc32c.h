// CRC32C (Castagnoli), the checksum of iSCSI (RFC 3720) and ext4: polynomial 0x1EDC6F41, least significant bit first,
// register preset to all ones and inverted at the end. It finds every error burst of up to 32 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace angelptm::io {

// The ways to compute it. All give the same number; the later ones in this list need a CPU that has the instructions.
enum class Crc32cKind {
  kTable,   // Eight tables of 256, any CPU: the reference.
  kSse42,   // x86: the crc32 instruction on three streams at once, joined with PCLMULQDQ.
  kAvx512,  // x86: 256 bytes at once, folded with VPCLMULQDQ.
  kArmv8,   // AArch64: the crc32cx instruction.
};

// The checksum of `bytes` bytes at `data`, which may be null if there are none. `seed` is the checksum of what came
// before: crc32c(b, crc32c(a)) == crc32c(a + b). Uses the fastest kind of this CPU. Any thread; allocates nothing.
std::uint32_t crc32c(const void* data, std::size_t bytes, std::uint32_t seed = 0);

// The name of the kind that crc32c() uses here.
const char* crc32c_implementation();

const char* crc32c_kind_name(Crc32cKind kind);

// The kinds that this CPU and build can run, slowest first; kTable is always the first.
std::vector<Crc32cKind> crc32c_kinds();

// The same by a given kind, for tests and benchmarks. Throws std::invalid_argument if this CPU or build lacks it.
std::uint32_t crc32c_with(Crc32cKind kind, const void* data, std::size_t bytes, std::uint32_t seed = 0);

}  // namespace angelptm::io
