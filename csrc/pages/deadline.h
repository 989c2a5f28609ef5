// When a wait of so many seconds is over.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace angelptm {

// A day stands for "forever": a longer wait would overflow the clock's range. What is not a number counts as no wait.
inline std::chrono::steady_clock::time_point deadline_after(double seconds) {
  const double bounded = seconds > 0 ? (seconds < 86400 ? seconds : 86400) : 0;
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(bounded));
}

// Waits until ``ready`` holds, at most so many seconds, and says whether it does. Time in which the whole process stood
// still does not count: it was stopped (Ctrl-Z, a debugger, a scheduler that suspends jobs), and with it the threads
// that it waits for.
template <typename Ready>
bool wait_while_running(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, double seconds,
                        const Ready& ready) {
  using Clock = std::chrono::steady_clock;
  constexpr Clock::duration slice = std::chrono::milliseconds(500);
  Clock::duration left = deadline_after(seconds) - Clock::now();
  while (left > Clock::duration::zero()) {
    const Clock::time_point began = Clock::now();
    const Clock::duration part = left < slice ? left : slice;
    if (changed.wait_for(lock, part, ready)) return true;
    const Clock::duration took = Clock::now() - began;
    left -= took < 2 * part ? took : part;
  }
  return ready();
}

}  // namespace angelptm
