// The loops of codec.h, once, over a vector-traits type; included after lanes_*.h (see the note on linkage in
// lanes_scalar.h).
#pragma once

#include "kernels/codec.h"
#include "kernels/lanes_scalar.h"

namespace angelptm::kernels {
namespace {

// Calls body with a vector-traits object and the index of its first element: whole vectors, then single elements.
template <class L, class Body>
inline void for_vectors(std::size_t count, const Body& body) {
  std::size_t i = 0;
  for (; count - i >= L::kFloats; i += L::kFloats) body(L(), i);
  for (; i < count; ++i) body(ScalarLanes(), i);
}

// 32 random bits for each element (the lowbias32 of Chris Wellons' hash prospector): 16 for each moment.
template <class L>
inline typename L::Int random_bits(Rounding rounding, std::size_t i) {
  typename L::Int x =
      L::differing(L::count_from(rounding.first_element + static_cast<std::uint32_t>(i)), L::all_bits(rounding.key));
  x = L::mul(L::differing(x, L::template right<16>(x)), L::all_bits(0x7feb352du));
  x = L::mul(L::differing(x, L::template right<15>(x)), L::all_bits(0x846ca68bu));
  return L::differing(x, L::template right<16>(x));
}

// The random bits of a run of elements: made when they are asked for, or taken from where they were made before.
struct Random {
  Rounding rounding;
  const std::uint32_t* made = nullptr;  // random_bits of each element

  // 0 .. 65535 for the moment.
  template <class L, Moment kMoment>
  typename L::Int of(std::size_t i) const {
    const typename L::Int random = made ? L::load_bits(made + i) : random_bits<L>(rounding, i);
    return kMoment == Moment::kExpAvg ? L::both(random, L::all_bits(0xffff)) : L::template right<16>(random);
  }
};

template <class L>
inline void make_random(Rounding rounding, std::uint32_t* to, std::size_t count) {
  for_vectors<L>(count, [&](auto lanes, std::size_t i) {
    using V = decltype(lanes);
    V::store_bits(to + i, random_bits<V>(rounding, i));
  });
}

// How codes are spaced: decode gives a value of [0, 1] from a magnitude q, and neighbours the two between which a
// value of [0, 1], times kRange, lies.
template <Moment kMoment>
struct Code;

template <>
struct Code<Moment::kExpAvg> {
  using Stored = std::int8_t;
  static constexpr float kRange = 16129.0f;  // 127^2
  static constexpr float kMost = 126.0f;     // the lower neighbour's

  template <class L>
  static typename L::Float value(typename L::Float q) {
    return L::mul(L::mul(q, L::abs(q)), L::all(1.0f / kRange));
  }
  template <class L>
  static typename L::Float root(typename L::Float x) {
    return L::sqrt(x);
  }
  template <class L>
  static typename L::Float power(typename L::Float q) {
    return L::mul(q, q);
  }
};

template <>
struct Code<Moment::kExpAvgSq> {
  using Stored = std::uint8_t;
  static constexpr float kRange = 4228250625.0f;  // 255^4
  static constexpr float kMost = 254.0f;

  template <class L>
  static typename L::Float value(typename L::Float q) {
    return L::mul(power<L>(q), L::all(1.0f / kRange));
  }
  template <class L>
  static typename L::Float root(typename L::Float x) {
    return L::sqrt(L::sqrt(x));
  }
  template <class L>
  static typename L::Float power(typename L::Float q) {
    const typename L::Float square = L::mul(q, q);
    return L::mul(square, square);
  }
};

template <class L, Moment kMoment>
void decode_8(const MomentCodes& codes, float* to, std::size_t count) {
  using C = Code<kMoment>;
  const auto* values = static_cast<const typename C::Stored*>(codes.values);
  for (std::size_t start = 0; start < count; start += kBlock8) {
    const std::size_t part = count - start < kBlock8 ? count - start : kBlock8;
    const float scale = ScalarLanes::one_nan(codes.scales[start / kBlock8]);  // which a product with it is then too
    for_vectors<L>(part, [&](auto lanes, std::size_t i) {
      using V = decltype(lanes);
      const typename V::Float q = V::to_float(V::load_codes(values + start + i));
      V::store(to + start + i, V::mul(C::template value<V>(q), V::all(scale)));
    });
  }
}

// The bits of the greatest magnitude; as unsigned numbers those of NaN are above those of inf.
template <class L>
std::uint32_t greatest(const float* from, std::size_t count) {
  typename L::Int most = L::all_bits(0);
  std::uint32_t rest = 0;
  std::size_t i = 0;
  for (; count - i >= L::kFloats; i += L::kFloats)
    most = L::greater_of(most, L::both(L::bits(L::load(from + i)), L::all_bits(0x7fffffffu)));
  for (; i < count; ++i) {
    const std::uint32_t bits = ScalarLanes::bits(from[i]) & 0x7fffffffu;
    rest = bits > rest ? bits : rest;
  }
  std::uint32_t each[L::kFloats];
  L::store_bits(each, most);
  for (const std::uint32_t bits : each) rest = bits > rest ? bits : rest;
  return rest;
}

template <class L, Moment kMoment>
void encode_8(const float* from, const MomentCodes& codes, std::size_t count, const Random& random) {
  using C = Code<kMoment>;
  constexpr float kLeast = 0x1p-100f;
  auto* values = static_cast<typename C::Stored*>(codes.values);
  for (std::size_t start = 0; start < count; start += kBlock8) {
    const std::size_t part = count - start < kBlock8 ? count - start : kBlock8;
    const std::uint32_t bits = greatest<L>(from + start, part);
    const bool finite = bits < 0x7f800000u;
    const float scale = finite ? ScalarLanes::of_bits(bits) : ScalarLanes::of_bits(0x7fc00000u);
    if (!finite || scale < kLeast) {
      codes.scales[start / kBlock8] = finite ? 0.0f : scale;
      for (std::size_t i = 0; i < part; ++i) values[start + i] = 0;
      continue;
    }
    codes.scales[start / kBlock8] = scale;
    const float to_range = C::kRange / scale;
    for_vectors<L>(part, [&](auto lanes, std::size_t i) {
      using V = decltype(lanes);
      using Float = typename V::Float;
      using Int = typename V::Int;
      const Float value = V::load(from + start + i);
      const Float x = V::mul(V::abs(value), V::all(to_range));
      const Int lower = V::truncate(V::lesser_of(C::template root<V>(x), V::all(C::kMost)));
      const Float q = V::to_float(lower);
      const Float below = C::template power<V>(q);
      const Float width = V::sub(C::template power<V>(V::add(q, V::all(1.0f))), below);
      const Float part_of_width =
          V::mul(V::add(V::to_float(random.of<V, kMoment>(start + i)), V::all(0.5f)), V::all(0x1p-16f));
      Int code = V::add(lower, V::one_if_less(V::mul(part_of_width, width), V::sub(x, below)));
      if constexpr (kMoment == Moment::kExpAvg) {
        const Int sign = V::template right<31>(V::bits(value));  // two's complement of the code where it is 1
        const Int mask = V::mul(sign, V::all_bits(0xffffffffu));
        code = V::add(V::differing(code, mask), sign);
      } else {
        // 1 where the value is above zero and the code would be 0
        const Int is_zero = V::one_if_less(V::to_float(code), V::all(0.5f));
        const Int is_more = V::one_if_less(V::all(0.0f), V::abs(value));
        code = V::add(code, V::both(is_zero, is_more));
      }
      V::store_codes(values + start + i, code);
    });
  }
}

template <class L, Moment kMoment>
void decode_lanes(const MomentCodes& codes, float* to, std::size_t count) {
  switch (codes.format) {
    case MomentFormat::kF32:
      return for_vectors<L>(count, [&](auto lanes, std::size_t i) {
        using V = decltype(lanes);
        V::store(to + i, V::load(static_cast<const float*>(codes.values) + i));
      });
    case MomentFormat::kBf16:
      return for_vectors<L>(count, [&](auto lanes, std::size_t i) {
        using V = decltype(lanes);
        V::store(to + i, V::load(static_cast<const std::uint16_t*>(codes.values) + i));
      });
    case MomentFormat::kInt8:
      return decode_8<L, kMoment>(codes, to, count);
  }
}

template <class L, Moment kMoment>
void encode_lanes(const float* from, const MomentCodes& codes, std::size_t count, const Random& random) {
  switch (codes.format) {
    case MomentFormat::kF32:
      return for_vectors<L>(count, [&](auto lanes, std::size_t i) {
        using V = decltype(lanes);
        V::store(static_cast<float*>(codes.values) + i, V::load(from + i));
      });
    case MomentFormat::kBf16:
      return for_vectors<L>(count, [&](auto lanes, std::size_t i) {
        using V = decltype(lanes);
        const typename V::Int bits = V::bits(V::one_nan(V::load(from + i)));
        const typename V::Int moved = V::add(bits, random.of<V, kMoment>(i));
        V::store(static_cast<std::uint16_t*>(codes.values) + i, V::of_bits(moved));
      });
    case MomentFormat::kInt8:
      return encode_8<L, kMoment>(from, codes, count, random);
  }
}

template <class L>
void join_lanes(const std::uint16_t* param, const std::int16_t* remainder, float* master, std::size_t count) {
  for_vectors<L>(count, [&](auto lanes, std::size_t i) {
    using V = decltype(lanes);
    V::store(master + i, V::of_bits(V::add(V::bits(V::load(param + i)), V::load_codes(remainder + i))));
  });
}

template <class L>
void split_lanes(const float* master, std::uint16_t* param, std::int16_t* remainder, std::size_t count) {
  for_vectors<L>(count, [&](auto lanes, std::size_t i) {
    using V = decltype(lanes);
    const typename V::Float value = V::one_nan(V::load(master + i));
    if (param) V::store(param + i, V::to_bf16_away(value));
    if (remainder) V::store_codes(remainder + i, V::bits(value));
  });
}

template <class L>
struct Codec {
  static void decode(Moment moment, const MomentCodes& codes, float* to, std::size_t count) {
    moment == Moment::kExpAvg ? decode_lanes<L, Moment::kExpAvg>(codes, to, count)
                              : decode_lanes<L, Moment::kExpAvgSq>(codes, to, count);
  }
  static void encode(Moment moment, const float* from, const MomentCodes& codes, std::size_t count, Rounding rounding) {
    const Random random{rounding};
    moment == Moment::kExpAvg ? encode_lanes<L, Moment::kExpAvg>(from, codes, count, random)
                              : encode_lanes<L, Moment::kExpAvgSq>(from, codes, count, random);
  }
};

}  // namespace
}  // namespace angelptm::kernels
