#include "pages/corrupt_page.h"

#include <cstring>

#include "io/crc32c.h"

namespace angelptm::pages {

namespace {

std::string hexadecimal(std::uint32_t value) {
  std::string text(8, '0');
  for (int digit = 0; digit < 8; ++digit) text[7 - digit] = "0123456789abcdef"[value >> (4 * digit) & 15];
  return text;
}

}  // namespace

CorruptPage::CorruptPage(PageId page_id, std::string file, std::uint64_t at, std::uint32_t written, std::uint32_t read)
    : std::runtime_error("page " + std::to_string(page_id) + " in " + file + " at offset " + std::to_string(at) +
                         ": CRC32C " + hexadecimal(read) + ", " + hexadecimal(written) + " was written"),
      page(page_id),
      path(std::move(file)),
      offset(at),
      expected(written),
      found(read) {}

std::uint32_t seal(std::byte* address, std::uint32_t used_bytes) {
  const std::uint64_t bytes = transfer_bytes(used_bytes);
  std::memset(address + used_bytes, 0, bytes - used_bytes);
  return io::crc32c(address, bytes);
}

void check(PageTable& table, PageId page, const PageInfo& info, const std::byte* address) {
  const std::uint32_t found = io::crc32c(address, transfer_bytes(info.used_bytes));
  if (found == info.crc) return;
  const CorruptPage error(page, table.ssd().files()[info.slot.file].file->path(), table.ssd().offset(info.slot),
                          info.crc, found);
  table.stop(error.what());
  throw error;
}

}  // namespace angelptm::pages
