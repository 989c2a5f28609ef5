// What made a sweep come out as it did: which gradients each update took, and
// which parameters each step computed with. Played again it gives the same
// bits, whatever the threads' timing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace angelptm::update {

struct Script {
  std::vector<std::vector<std::uint32_t>> takes;  // of each span: gradients of its first, second, ... update
  std::vector<std::vector<std::uint32_t>> uses;   // of each span: updates published before its first, second, ... use
};

// Thread-safe.
class Recorder {
 public:
  explicit Recorder(std::size_t spans) {
    script_.takes.resize(spans);
    script_.uses.resize(spans);
  }

  void took(std::uint32_t span, std::uint32_t gradients) {
    std::lock_guard lock(mutex_);
    script_.takes[span].push_back(gradients);
  }
  void used(std::uint32_t span, std::uint32_t publishes) {
    std::lock_guard lock(mutex_);
    script_.uses[span].push_back(publishes);
  }
  Script script() const {
    std::lock_guard lock(mutex_);
    return script_;
  }

 private:
  mutable std::mutex mutex_;
  Script script_;
};

// Thread-safe. Where the script ends, or is ended, everything is allowed.
class Player {
 public:
  explicit Player(Script script)
      : script_(std::move(script)),
        taken_(script_.takes.size()),
        published_(script_.takes.size()),
        used_(script_.takes.size()),
        wanted_(script_.takes.size()) {}

  // Whether so many gradients are all that the next update has.
  bool is_whole(std::uint32_t span, std::uint32_t waiting) const {
    std::lock_guard lock(mutex_);
    const auto& takes = script_.takes[span];
    return taken_[span] >= takes.size() ? waiting > 0 : waiting == takes[taken_[span]];
  }
  // An update that cannot be published yet is begun only where the computing thread waits for its gradients' being
  // taken. When this was recorded no more of these were under way than there were threads, so rings have room for them.
  bool may_take(std::uint32_t span, std::uint32_t waiting) const {
    return is_whole(span, waiting) && (may_publish(span) || is_wanted(span));
  }
  bool may_publish(std::uint32_t span) const {
    std::lock_guard lock(mutex_);
    const auto& uses = script_.uses[span];
    return used_[span] >= uses.size() || published_[span] < uses[used_[span]];
  }
  bool is_ready(std::uint32_t span) const {  // for its next use
    std::lock_guard lock(mutex_);
    const auto& uses = script_.uses[span];
    return used_[span] >= uses.size() || published_[span] == uses[used_[span]];
  }
  void took(std::uint32_t span) {
    std::lock_guard lock(mutex_);
    ++taken_[span];
    wanted_[span] = false;
  }
  void published(std::uint32_t span) {
    std::lock_guard lock(mutex_);
    ++published_[span];
  }
  void used(std::uint32_t span) {
    std::lock_guard lock(mutex_);
    ++used_[span];
  }
  void end() {
    std::lock_guard lock(mutex_);
    for (auto* lists : {&script_.takes, &script_.uses})
      for (auto& list : *lists) list.clear();
  }
  void want(std::uint32_t span) {
    std::lock_guard lock(mutex_);
    wanted_[span] = true;
  }

 private:
  bool is_wanted(std::uint32_t span) const {
    std::lock_guard lock(mutex_);
    return wanted_[span];
  }

  Script script_;
  mutable std::mutex mutex_;
  std::vector<std::size_t> taken_, published_, used_;
  std::vector<bool> wanted_;
};

}  // namespace angelptm::update
