// The reference queue: a fixed pool of threads that call pread, pwrite and fdatasync.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "io/queue.h"

namespace angelptm::io {

namespace {

class ThreadQueue final : public Queue {
 public:
  ThreadQueue(std::vector<std::shared_ptr<const File>> files, std::size_t depth, std::size_t threads)
      : files_(std::move(files)), depth_(depth), ring_(depth) {
    if (depth == 0 || threads == 0) throw std::invalid_argument("depth and threads must be positive");
    answered_.reserve(depth);
    workers_.reserve(threads);
    try {
      for (std::size_t i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      stop();
      throw IoError(Op::kSetup, "", 0, 0, error.code().value(), "no thread for the pool");
    }
  }

  ~ThreadQueue() override { stop(); }

  const char* name() const override { return "threads"; }
  std::size_t depth() const override { return depth_; }

  std::size_t submit(std::span<const Attempt> attempts) override {
    std::size_t taken = 0;
    {
      const std::lock_guard lock(mutex_);
      taken = std::min(attempts.size(), depth_ - in_flight_);
      for (std::size_t i = 0; i < taken; ++i) ring_[(head_ + pending_ + i) % depth_] = attempts[i];
      pending_ += taken;
      in_flight_ += taken;
    }
    for (std::size_t i = 0; i < taken; ++i) work_arrived_.notify_one();
    return taken;
  }

  std::size_t reap(std::vector<Answer>& answers, std::size_t at_least, Clock::time_point deadline) override {
    std::unique_lock lock(mutex_);
    answer_arrived_.wait_until(lock, deadline, [&] { return answered_.size() >= at_least; });
    const std::size_t count = answered_.size();
    answers.insert(answers.end(), answered_.begin(), answered_.end());
    answered_.clear();
    in_flight_ -= count;
    return count;
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      work_arrived_.wait(lock, [this] { return stopping_ || pending_ > 0; });
      if (stopping_) return;
      const Attempt attempt = ring_[head_];
      head_ = (head_ + 1) % depth_;
      --pending_;
      lock.unlock();
      const std::int32_t result = transfer(attempt);
      lock.lock();
      answered_.push_back({attempt.id, result});
      answer_arrived_.notify_one();
    }
  }

  std::int32_t transfer(const Attempt& attempt) const {
    const int descriptor = files_[static_cast<std::size_t>(attempt.file)]->descriptor();
    const auto offset = static_cast<off_t>(attempt.offset);
    ssize_t result = 0;
    if (attempt.op == Op::kSync) {
      result = ::fdatasync(descriptor);
    } else if (attempt.op == Op::kRead) {
      result = ::pread(descriptor, attempt.buffer, attempt.bytes, offset);
    } else {
      result = ::pwrite(descriptor, attempt.buffer, attempt.bytes, offset);
    }
    return result < 0 ? -errno : static_cast<std::int32_t>(result);
  }

  // What no worker has begun is dropped: only a queue whose owner gave up has any.
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    work_arrived_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  const std::vector<std::shared_ptr<const File>> files_;
  const std::size_t depth_;
  std::mutex mutex_;  // guards everything below but the workers
  std::condition_variable work_arrived_, answer_arrived_;
  std::vector<Attempt> ring_;  // [head_, head_ + pending_) modulo depth_ wait for a worker
  std::size_t head_ = 0, pending_ = 0;
  std::size_t in_flight_ = 0;  // taken and not yet reaped
  std::vector<Answer> answered_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace

std::unique_ptr<Queue> make_thread_queue(std::vector<std::shared_ptr<const File>> files, std::size_t depth,
                                         std::size_t threads) {
  return std::make_unique<ThreadQueue>(std::move(files), depth, threads);
}

}  // namespace angelptm::io
