// A handle on asynchronous work: a count of parts that remain, and the first error among them.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "pages/deadline.h"

namespace angelptm {

struct DeadlineError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Thread-safe. The side that works calls finish_part; any side may wait.
class Ticket {
 public:
  // `what` completes "waited N s for ..." in the message of a missed deadline.
  Ticket(std::string what, std::size_t parts) : what_(std::move(what)), remaining_(parts) {}

  void finish_part(std::exception_ptr error = nullptr) {
    std::lock_guard lock(mutex_);
    if (error && !error_) error_ = error;
    if (--remaining_ == 0) finished_.notify_all();
  }

  // The error of a part that is not finished yet: error() shows it at once, and nobody is woken.
  void set_error(const std::exception_ptr& error) {
    std::lock_guard lock(mutex_);
    if (!error_) error_ = error;
  }

  bool done() const {
    std::lock_guard lock(mutex_);
    return remaining_ == 0;
  }

  // The first error so far; null without one.
  std::exception_ptr error() const {
    std::lock_guard lock(mutex_);
    return error_;
  }

  // Returns when all parts are done; throws the first part's error, or DeadlineError.
  void wait(double deadline_seconds) {
    std::unique_lock lock(mutex_);
    if (!wait_while_running(finished_, lock, deadline_seconds, [this] { return remaining_ == 0; }))
      throw DeadlineError("waited " + std::to_string(deadline_seconds) + " s for " + what_ + ": " +
                          std::to_string(remaining_) + " parts are not done");
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::string what_;
  mutable std::mutex mutex_;
  std::condition_variable finished_;
  std::size_t remaining_;
  std::exception_ptr error_;
};

}  // namespace angelptm
