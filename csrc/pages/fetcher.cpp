#include "pages/fetcher.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "pages/corrupt_page.h"
#include "pages/deadline.h"
#include "timeline/recorder.h"

namespace angelptm::pages {

namespace {

// While reads are under way the thread looks this often for what else it could do: a fetch, a loan.
constexpr std::chrono::microseconds kLook{300};
// And this often for copies that the device makes.
constexpr std::chrono::microseconds kLookAtDevice{20};
// And this often for a staging frame, when the others hold all of them.
constexpr std::chrono::milliseconds kLookForFrame{1};

double seconds_since(io::Clock::time_point start) {
  return std::chrono::duration<double>(io::Clock::now() - start).count();
}

}  // namespace

Fetcher::Fetcher(PageTable& table, std::unique_ptr<io::Engine> engine, PageMover* mover, std::size_t most_frames,
                 double deadline_seconds, std::shared_ptr<device::CopyStream> stream)
    : table_(table),
      engine_(std::move(engine)),
      mover_(mover),
      most_frames_(most_frames),
      deadline_seconds_(deadline_seconds),
      stream_(std::move(stream)) {
  if (most_frames_ == 0) throw std::invalid_argument("a fetcher needs at least one staging frame");
  last_answer_ = io::Clock::now();
  thread_ = std::thread([this] {
    timeline::name_lane("fetcher");
    run();
  });
}

Fetcher::~Fetcher() {
  {
    Lock lock(mutex_);
    stopping_ = true;
    ++changes_;
  }
  wake_.notify_all();
  thread_.join();
  if (!broken_) reap_all();
  engine_.reset();  // first: it waits until the kernel has let go of the frames
  for (const auto& [page, held] : held_)
    if (!held.reading) table_.host().release(held.frame);  // the kernel may still write to the others
}

void Fetcher::reap_all() {
  Lock lock(mutex_);
  std::vector<io::Outcome> outcomes;
  try {
    engine_->reap(outcomes, engine_->unfinished(), deadline_after(deadline_seconds_));
  } catch (const io::IoError&) {
    // What came before the deadline is in `outcomes`.
  }
  for (const io::Outcome& outcome : outcomes) settle(outcome, lock);
}

std::shared_ptr<Ticket> Fetcher::fetch(std::string what, std::vector<FetchItem> items, std::shared_ptr<Ticket> after,
                                       bool urgent, device::CopyStream::Mark computed) {
  for (const FetchItem& item : items) (void)table_.info(item.page);  // std::out_of_range before anything is queued
  auto ticket = std::make_shared<Ticket>(std::move(what), items.size());
  if (items.empty()) return ticket;
  {
    Lock lock(mutex_);
    if (broken_) {
      for (const FetchItem& item : items) {
        let_go_of(item);
        ticket->finish_part(broken_);
      }
      return ticket;
    }
    requests_.insert(urgent ? requests_.begin() : requests_.end(),
                     Request{ticket, std::move(after), std::move(items), computed});
    ++changes_;
  }
  wake_.notify_all();
  return ticket;
}

void Fetcher::read_ahead(const std::vector<PageId>& pages) {
  for (const PageId page : pages) (void)table_.info(page);  // std::out_of_range here, not on the thread
  {
    Lock lock(mutex_);
    letting_go_ = false;
    ahead_.assign(pages.begin(), pages.end());
    ++changes_;
  }
  wake_.notify_all();
}

void Fetcher::let_go() {
  Lock lock(mutex_);
  ahead_.clear();
  letting_go_ = true;
  for (auto held = held_.begin(); held != held_.end();) {
    const auto here = held++;
    if (here->second.reading || here->second.in_use || wanted(here->first, lock)) continue;
    drop(here->first, lock);
  }
}

void Fetcher::look_for_errors() {
  {
    Lock lock(mutex_);
    ++changes_;
  }
  wake_.notify_all();
}

void Fetcher::lend(PageId page, std::uint64_t version, const std::byte* address) {
  {
    Lock lock(mutex_);
    loans_[page] = Loan{address, version, 0};
    ++changes_;
  }
  wake_.notify_all();
}

Frame Fetcher::take_back(PageId page, Frame frame, bool published, std::uint32_t rank) {
  {
    Lock lock(mutex_);
    if (!loans_.contains(page)) return frame;
    // Other loans come and go meanwhile, so no iterator would hold.
    returned_.wait(lock, [&] { return loans_.at(page).readers == 0; });  // a copy of one page at most
    loans_.erase(page);
    if (published && !stopping_) frame = keep(page, frame, rank, lock).value_or(frame);
    ++changes_;
  }
  wake_.notify_all();
  return frame;
}

// Holds what a frame has; returns a free one in its place, or nothing where there is none to spare.
std::optional<Frame> Fetcher::keep(PageId page, Frame frame, std::uint32_t rank, Lock& lock) {
  if (const auto held = held_.find(page); held != held_.end()) {
    if (held->second.reading || held->second.in_use) return std::nullopt;
    drop(page, lock);  // of a version that has passed
  }
  std::optional<Frame> other;
  if (held_.size() < most_frames_) other = table_.host().allocate();
  if (!other) {
    auto farthest = held_.end();
    for (auto held = held_.begin(); held != held_.end(); ++held)
      if (!held->second.reading && !held->second.in_use && held->second.rank > rank && !wanted(held->first, lock) &&
          (farthest == held_.end() || held->second.rank > farthest->second.rank))
        farthest = held;
    if (farthest == held_.end()) return std::nullopt;
    other = farthest->second.frame;
    held_.erase(farthest);
  }
  held_.emplace(page, Held{frame, table_.info(page), false, true, false, rank, {}});
  return other;
}

FetchTotals Fetcher::totals() const {
  Lock lock(mutex_);
  return totals_;
}

bool Fetcher::is_current(const PageInfo& held, const PageInfo& now) {
  return same_content(held, now) && held.version >= now.expected;
}

void Fetcher::run() {
  Lock lock(mutex_);
  while (!stopping_) {
    if (broken_) {
      wake_.wait(lock, [&] { return stopping_; });
      break;
    }
    const std::uint64_t seen = changes_;
    if (drop_failed(lock)) continue;
    const bool starved = start_reads(lock);
    if (copy_one(lock)) continue;
    if (!copying_.empty()) {
      settle_copies(lock);
      if (changes_ != seen || copying_.empty()) continue;
      if (engine_->unfinished() == 0) {
        wake_.wait_for(lock, kLookAtDevice);
        continue;
      }
    }
    if (engine_->unfinished() > 0) {
      reap(lock);
      continue;
    }
    const auto changed = [&] { return stopping_ || changes_ != seen; };
    if (!starved) {
      const timeline::Scope scope(timeline::What::kWaitWork);
      wake_.wait(lock, changed);
      continue;
    }
    // An update that fails tells its ticket after it has taken back what was lent, and wakes nobody then.
    wake_.wait_for(lock, kLookForFrame, changed);
    if (!starved || mover_ == nullptr) continue;
    lock.unlock();
    try {
      mover_->look();
    } catch (const io::IoError&) {
      // A queue that is broken tells the mover's own users.
    }
    lock.lock();
  }
  while (!requests_.empty())
    fail(requests_.begin(), std::make_exception_ptr(std::runtime_error("the fetcher was closed")), lock);
  if (!broken_) wait_for_copies(lock);
}

// An update that failed publishes nothing: whoever waits for it learns why.
bool Fetcher::drop_failed(Lock& lock) {
  for (auto request = requests_.begin(); request != requests_.end(); ++request) {
    if (!request->after) continue;
    if (const std::exception_ptr error = request->after->error()) {
      fail(request, error, lock);
      return true;
    }
  }
  return false;
}

void Fetcher::let_go_of(const FetchItem& item) {
  if (item.release_held) table_.host().release_reader(item.held);
}

void Fetcher::fail(Requests::iterator request, const std::exception_ptr& error, Lock&) {
  for (const FetchItem& item : request->items) {
    let_go_of(item);
    request->ticket->finish_part(error);
  }
  requests_.erase(request);
}

bool Fetcher::wanted(PageId page, Lock&) const {
  return std::any_of(requests_.begin(), requests_.end(), [&](const Request& request) {
    return std::any_of(request.items.begin(), request.items.end(),
                       [&](const FetchItem& item) { return item.page == page; });
  });
}

void Fetcher::drop(PageId page, Lock&) {
  const auto held = held_.find(page);
  table_.host().release(held->second.frame);
  held_.erase(held);
}

// A frame of the quota; with `evict`, one that holds what nobody has asked for yet, if there is no other.
std::optional<Frame> Fetcher::frame_now(bool evict, Lock& lock) {
  // A hint leaves one: a page that is asked for would else displace what was read for the hint, in vain.
  if (held_.size() + (evict ? 0 : 1) < most_frames_) {
    if (const auto frame = table_.host().allocate()) return frame;
  }
  if (!evict) return std::nullopt;
  for (const auto& [page, held] : held_) {
    if (held.reading || held.in_use || wanted(page, lock)) continue;
    const PageId found = page;
    drop(found, lock);
    return table_.host().allocate();
  }
  return std::nullopt;
}

bool Fetcher::begin_read(PageId page, const PageInfo& info, bool evict, Lock& lock) {
  const auto frame = frame_now(evict, lock);
  if (!frame) return false;
  if (engine_->unfinished() == 0) last_answer_ = io::Clock::now();
  const io::Transfer transfer{page,
                              io::Op::kRead,
                              static_cast<int>(info.slot.file),
                              table_.ssd().offset(info.slot),
                              table_.host().address(*frame),
                              transfer_bytes(info.used_bytes)};
  held_.emplace(page, Held{*frame, info, true, false, false, 0, timeline::begin()});
  try {
    engine_->submit({&transfer, 1});
  } catch (const io::IoError&) {
    break_down(std::current_exception(), lock);  // the engine holds the transfer, and the kernel perhaps the frame
  }
  return true;
}

bool Fetcher::start_reads(Lock& lock) {
  if (broken_) return false;
  for (auto request = requests_.begin(); request != requests_.end(); ++request) {
    for (const FetchItem& item : request->items) {
      if (item.held != kNoFrame) continue;
      const PageInfo info = table_.info(item.page);
      if (const auto held = held_.find(item.page); held != held_.end()) {
        if (held->second.reading || held->second.in_use || is_current(held->second.info, info)) continue;
        drop(item.page, lock);  // of a version that has passed; also while the new one is waited for, by others too
      }
      if (info.home == Home::kHost || !info.written || info.version < info.expected) continue;
      // What is lent is copied from there; if it is taken back before, this is looked at again.
      if (const auto loan = loans_.find(item.page); loan != loans_.end() && loan->second.version >= info.expected)
        continue;
      if (!begin_read(item.page, info, true, lock)) return engine_->unfinished() == 0;
      if (broken_) return false;
    }
  }
  while (!ahead_.empty()) {
    const PageId page = ahead_.front();
    const PageInfo info = table_.info(page);
    if (const auto held = held_.find(page);
        held != held_.end() && !held->second.reading && !held->second.in_use && !is_current(held->second.info, info))
      drop(page, lock);
    if (info.home == Home::kSsd && info.written && info.version >= info.expected && !held_.contains(page) &&
        !loans_.contains(page) && !begin_read(page, info, false, lock))
      break;  // Fetches will free the frames.
    if (broken_) return false;
    ahead_.pop_front();
  }
  return false;
}

// The first page that is at hand, in the order of the requests.
bool Fetcher::copy_one(Lock& lock) {
  for (auto request = requests_.begin(); request != requests_.end(); ++request) {
    for (std::size_t i = 0; i < request->items.size(); ++i) {
      const PageId page = request->items[i].page;
      const PageInfo info = table_.info(page);
      const auto held = held_.find(page);
      const auto loan = loans_.find(page);
      const bool at_hand =
          request->items[i].held != kNoFrame || (loan != loans_.end() && loan->second.version >= info.expected) ||
          (info.version >= info.expected && (info.home == Home::kHost || !info.written)) ||
          (held != held_.end() && !held->second.reading && !held->second.in_use && is_current(held->second.info, info));
      // An update that failed since drop_failed looked has set its error first, and then made the former version do.
      if (!at_hand || (request->after && request->after->error())) continue;
      copy(request, i, lock);
      return true;
    }
  }
  return false;
}

void Fetcher::copy(Requests::iterator request, std::size_t index, Lock& lock) {
  const FetchItem item = request->items[index];
  const PageInfo info = table_.info(item.page);
  const auto loan = loans_.find(item.page);
  const auto held = held_.find(item.page);
  const bool lent = item.held == kNoFrame && loan != loans_.end() && loan->second.version >= info.expected;
  const bool from_frame = !lent && item.held == kNoFrame && info.home == Home::kSsd && info.written;
  const std::byte* from = item.held != kNoFrame                      ? table_.host().address(item.held)
                          : lent                                     ? loan->second.address
                          : from_frame                               ? table_.host().address(held->second.frame)
                          : info.home == Home::kHost && info.written ? table_.address(info)
                                                                     : nullptr;
  const bool unchecked = from_frame && !held->second.checked;
  const bool handed_over = lent || (from_frame && held->second.checked);
  if (lent) ++loan->second.readers;
  if (from_frame) held->second.in_use = true;
  const PageInfo read_from = from_frame ? held->second.info : info;
  const device::CopyStream::Mark computed = std::exchange(request->computed, 0);
  device::CopyStream::Mark mark = 0;
  // Only this thread removes requests, so the iterator holds.
  lock.unlock();
  const auto start = io::Clock::now();
  timeline::end(timeline::What::kWaitIo, std::exchange(waiting_since_, {}), 0, 0);
  std::exception_ptr error;
  bool device_failed = false;
  const auto recorded = timeline::begin();
  try {
    if (unchecked) {
      const timeline::Scope scope(timeline::What::kCheck, item.page, info.used_bytes);
      check(table_, item.page, read_from, from);
    }
    if (stream_ != nullptr) {
      device_failed = true;  // unless it goes well
      stream_->wait_for(computed);
      stream_->copy(item.to, from, info.used_bytes);
      mark = stream_->mark();
      device_failed = false;
    } else {
      const timeline::Scope scope(timeline::What::kCopy, item.page, info.used_bytes);
      if (from != nullptr)
        std::memcpy(item.to, from, info.used_bytes);
      else
        std::memset(item.to, 0, info.used_bytes);
    }
  } catch (...) {
    error = std::current_exception();
  }
  const double seconds = seconds_since(start);
  lock.lock();
  totals_.copy_seconds += seconds;
  if (device_failed) {
    if (lent) give_back_source({item.page, item.to}, true, false, lock);
    break_down(error, lock);
    return;
  }
  if (error) {
    give_back_source({item.page, item.to}, lent, from_frame, lock);  // what is held goes with the request
    fail(request, error, lock);
    return;
  }
  totals_.copied_bytes += info.used_bytes;
  if (handed_over) totals_.handed_over_bytes += info.used_bytes;
  request->items.erase(request->items.begin() + static_cast<std::ptrdiff_t>(index));
  const auto ticket = request->ticket;
  if (request->items.empty()) requests_.erase(request);
  if (stream_ != nullptr) {
    copying_.push_back({ticket, item, lent, from_frame, mark, start, recorded});
    return;
  }
  give_back_source(item, lent, from_frame, lock);
  ticket->finish_part();
}

// Nobody reads it any more.
void Fetcher::give_back_source(const FetchItem& item, bool lent, bool from_frame, Lock& lock) {
  if (lent && --loans_.at(item.page).readers == 0) returned_.notify_all();
  if (from_frame) drop(item.page, lock);
  let_go_of(item);
}

// Copies that the device has made.
void Fetcher::settle_copies(Lock& lock) {
  while (!copying_.empty() && !broken_) {
    const device::CopyStream::Mark mark = copying_.front().mark;
    std::exception_ptr error;
    bool passed = false;
    lock.unlock();
    try {
      passed = stream_->passed(mark);
    } catch (const device::DeviceError&) {
      error = std::current_exception();
    }
    lock.lock();
    const Copying& first = copying_.front();  // which only this thread removes
    if (!error && !passed && seconds_since(first.began) > deadline_seconds_)
      error = std::make_exception_ptr(
          DeadlineError("waited " + std::to_string(deadline_seconds_) + " s for a copy of a page to the device"));
    if (error) {
      break_down(error, lock);
      return;
    }
    if (!passed) return;
    timeline::end(timeline::What::kCopy, first.recorded, first.item.page, table_.info(first.item.page).used_bytes);
    give_back_source(first.item, first.lent, first.from_frame, lock);
    first.ticket->finish_part();
    copying_.pop_front();
    ++changes_;
  }
}

void Fetcher::wait_for_copies(Lock& lock) {
  while (!copying_.empty() && !broken_) {
    settle_copies(lock);
    wake_.wait_for(lock, kLookAtDevice);
  }
}

void Fetcher::reap(Lock& lock) {
  lock.unlock();
  if (waiting_since_ == io::Clock::time_point{}) waiting_since_ = timeline::begin();
  std::vector<io::Outcome> outcomes;
  std::exception_ptr error;
  try {
    engine_->reap_some(outcomes, 1, io::Clock::now() + (copying_.empty() ? kLook : kLookAtDevice));
    if (outcomes.empty() && seconds_since(last_answer_) > deadline_seconds_)
      engine_->reap(outcomes, 1, io::Clock::now());  // throws, and names what does not come
  } catch (const io::IoError&) {
    error = std::current_exception();
  }
  lock.lock();
  if (!outcomes.empty()) {
    last_answer_ = io::Clock::now();
    timeline::end(timeline::What::kWaitIo, std::exchange(waiting_since_, {}), 0, 0);
  }
  for (const io::Outcome& outcome : outcomes) settle(outcome, lock);
  totals_.io = engine_->counters();
  if (error) break_down(error, lock);
}

void Fetcher::settle(const io::Outcome& outcome, Lock& lock) {
  const auto page = static_cast<PageId>(outcome.tag);
  Held& held = held_.at(page);
  held.reading = false;
  timeline::end(timeline::What::kRead, held.submitted, page, transfer_bytes(held.info.used_bytes));
  const bool passed = !same_content(held.info, table_.info(page));  // its slot may hold anything by now
  if (!outcome.error && !passed && !(letting_go_ && !wanted(page, lock))) return;
  drop(page, lock);
  if (!outcome.error || passed) return;
  const auto error = std::make_exception_ptr(*outcome.error);
  for (auto request = requests_.begin(); request != requests_.end();) {
    const auto here = request++;
    if (std::any_of(here->items.begin(), here->items.end(), [&](const FetchItem& item) { return item.page == page; }))
      fail(here, error, lock);
  }
}

// The frames stay with the kernel or the device; whoever asks from here on is told.
void Fetcher::break_down(std::exception_ptr error, Lock& lock) {
  if (!broken_) broken_ = std::move(error);
  while (!requests_.empty()) fail(requests_.begin(), broken_, lock);
  for (const Copying& one : copying_) {
    // The updater's loan ends, whatever the device still reads: nobody will look at what it copied.
    if (one.lent) give_back_source({one.item.page, one.item.to}, true, false, lock);
    one.ticket->finish_part(broken_);
  }
  copying_.clear();  // each ticket is told once, whatever breaks next
  ahead_.clear();
}

}  // namespace angelptm::pages
