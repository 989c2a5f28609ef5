// What was read is not what was written.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "pages/page_table.h"

namespace angelptm::pages {

// Thrown after the table was stopped: nothing is written to the store any more.
struct CorruptPage : std::runtime_error {
  CorruptPage(PageId page, std::string path, std::uint64_t offset, std::uint32_t expected, std::uint32_t found);
  PageId page;
  std::string path;
  std::uint64_t offset;
  std::uint32_t expected, found;  // CRC32C
};

// Bytes that travel for a page with `used` content bytes: whole sectors of 4096. A frame has room for them.
constexpr std::uint64_t transfer_bytes(std::uint32_t used) { return (std::uint64_t{used} + 4095) / 4096 * 4096; }

// Zeroes what a frame holds between its content and the end of the last sector, so that no bytes of another page reach
// the file, and returns the CRC32C of all that will be written.
std::uint32_t seal(std::byte* address, std::uint32_t used_bytes);

// Compares what was read from the page's slot with what was written there; stops the table and throws CorruptPage.
void check(PageTable& table, PageId page, const PageInfo& info, const std::byte* address);

}  // namespace angelptm::pages
