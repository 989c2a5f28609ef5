// When a wait of so many seconds is over.
#pragma once

#include <chrono>

namespace angelptm {

// A day stands for "forever": a longer wait would overflow the clock's range. What is not a number counts as no wait.
inline std::chrono::steady_clock::time_point deadline_after(double seconds) {
  const double bounded = seconds > 0 ? (seconds < 86400 ? seconds : 86400) : 0;
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(bounded));
}

}  // namespace angelptm
