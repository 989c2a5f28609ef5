// One stream of the crc32c instructions of ARMv8.
#include "io/crc32c_kinds.h"

#ifdef ANGELPTM_CRC32C_ARM

#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include <cstring>

namespace angelptm::io {

bool has_armv8_crc() { return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0; }

[[gnu::target("+crc")]] std::uint32_t crc32c_armv8(std::uint32_t state, const unsigned char* data, std::size_t bytes) {
  for (; bytes >= 8; data += 8, bytes -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, sizeof word);
    state = __crc32cd(state, word);
  }
  for (; bytes; ++data, --bytes) state = __crc32cb(state, *data);
  return state;
}

}  // namespace angelptm::io

#endif
