// The entry points of each kind of CRC32C, for crc32c.cpp and each other alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace angelptm::io {

// The register without its inversions: `state` is what earlier bytes left in it.
using Crc32cUpdate = std::uint32_t(std::uint32_t state, const unsigned char* data, std::size_t bytes);

Crc32cUpdate crc32c_table;

#if defined(__x86_64__) && defined(__GNUC__)
#define ANGELPTM_CRC32C_X86 1
Crc32cUpdate crc32c_sse42, crc32c_avx512;
// To clang, the crc32 instruction is a feature beside SSE4.2; older versions of GCC do not know that name.
#ifdef __clang__
#define ANGELPTM_CRC32C_SSE42 "sse4.2,crc32,pclmul"
#else
#define ANGELPTM_CRC32C_SSE42 "sse4.2,pclmul"
#endif
#endif

#if defined(__aarch64__) && defined(__GNUC__) && defined(__linux__)
#define ANGELPTM_CRC32C_ARM 1
Crc32cUpdate crc32c_armv8;
bool has_armv8_crc();
#endif

}  // namespace angelptm::io
