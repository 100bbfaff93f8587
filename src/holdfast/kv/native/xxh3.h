/* XXH3-64 with a seed, for inputs of any length, and the chained block hashes built from it.
 *
 * Written from the published specification of XXH3 (xxhash_spec.md); tests/kv/test_kv_kernel.py compares every length
 * class with the `xxhash` package. Must never touch Python: plain memory in, plain memory out.
 */
#ifndef HOLDFAST_XXH3_H
#define HOLDFAST_XXH3_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__SIZEOF_INT128__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernel needs a 64-bit little-endian machine; elsewhere the Python implementation runs"
#endif

typedef uint64_t u64;
typedef uint32_t u32;

#define P32_1 0x9E3779B1U
#define P32_2 0x85EBCA77U
#define P32_3 0xC2B2AE3DU
#define P64_1 0x9E3779B185EBCA87ULL
#define P64_2 0xC2B2AE3D27D4EB4FULL
#define P64_3 0x165667B19E3779F9ULL
#define P64_4 0x85EBCA77C2B2AE63ULL
#define P64_5 0x27D4EB2F165667C5ULL
#define MX_1 0x165667919E3779F9ULL
#define MX_2 0x9FB21C651E98DF25ULL
#define SECRET_BYTES 192
#define STRIPE 64
#define STRIPES_PER_BLOCK 16

static const uint8_t xxh3_secret[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

static inline u64 read64(const uint8_t *p) { u64 v; memcpy(&v, p, 8); return v; }
static inline u32 read32(const uint8_t *p) { u32 v; memcpy(&v, p, 4); return v; }
static inline u64 secret64(size_t at) { return read64(xxh3_secret + at); }
static inline u64 rotl64(u64 v, int by) { return (v << by) | (v >> (64 - by)); }

static inline u64 mul_fold(u64 a, u64 b) {
  unsigned __int128 product = (unsigned __int128)a * b;
  return (u64)product ^ (u64)(product >> 64);
}

static inline u64 avalanche(u64 h) {
  h ^= h >> 37;
  h *= MX_1;
  return h ^ (h >> 32);
}

static inline u64 avalanche64(u64 h) {
  h = (h ^ (h >> 33)) * P64_2;
  h = (h ^ (h >> 29)) * P64_3;
  return h ^ (h >> 32);
}

static inline u64 mix16(const uint8_t *in, size_t at, u64 seed) {
  return mul_fold(read64(in) ^ (secret64(at) + seed), read64(in + 8) ^ (secret64(at + 8) - seed));
}

static inline u64 xxh3_9to16(const uint8_t *in, size_t len, u64 seed) {
  u64 low = read64(in) ^ ((secret64(24) ^ secret64(32)) + seed);
  u64 high = read64(in + len - 8) ^ ((secret64(40) ^ secret64(48)) - seed);
  return avalanche(len + __builtin_bswap64(low) + high + mul_fold(low, high));
}

static u64 xxh3_0to8(const uint8_t *in, size_t len, u64 seed) {
  if (len == 0) return avalanche64(seed ^ secret64(56) ^ secret64(64));
  if (len < 4) {
    u32 combined = ((u32)in[0] << 16) | ((u32)in[len >> 1] << 24) | in[len - 1] | ((u32)len << 8);
    return avalanche64(combined ^ ((u64)(read32(xxh3_secret) ^ read32(xxh3_secret + 4)) + seed));
  }
  seed ^= (u64)__builtin_bswap32((u32)seed) << 32;
  u64 h = (read32(in + len - 4) + ((u64)read32(in) << 32)) ^ ((secret64(8) ^ secret64(16)) - seed);
  h ^= rotl64(h, 49) ^ rotl64(h, 24);
  h *= MX_2;
  h ^= (h >> 35) + len;
  h *= MX_2;
  return h ^ (h >> 28);
}

static inline u64 xxh3_17to128(const uint8_t *in, size_t len, u64 seed) {
  u64 sum = len * P64_1;
  if (len > 96) sum += mix16(in + 48, 96, seed) + mix16(in + len - 64, 112, seed);
  if (len > 64) sum += mix16(in + 32, 64, seed) + mix16(in + len - 48, 80, seed);
  if (len > 32) sum += mix16(in + 16, 32, seed) + mix16(in + len - 32, 48, seed);
  return avalanche(sum + mix16(in, 0, seed) + mix16(in + len - 16, 16, seed));
}

static u64 xxh3_129to240(const uint8_t *in, size_t len, u64 seed) {
  u64 sum = len * P64_1;
  size_t rounds = len / 16, i;
  for (i = 0; i < 8; i++) sum += mix16(in + 16 * i, 16 * i, seed);
  sum = avalanche(sum);
  for (; i < rounds; i++) sum += mix16(in + 16 * i, 16 * (i - 8) + 3, seed);
  return avalanche(sum + mix16(in + len - 16, 136 - 17, seed));
}

static inline void accumulate(u64 *acc, const uint8_t *in, const uint8_t *secret) {
  for (int i = 0; i < 8; i++) {
    u64 data = read64(in + 8 * i), keyed = data ^ read64(secret + 8 * i);
    acc[i ^ 1] += data;
    acc[i] += (u64)(u32)keyed * (keyed >> 32);
  }
}

static inline void scramble(u64 *acc, const uint8_t *secret) {
  for (int i = 0; i < 8; i++) acc[i] = ((acc[i] ^ (acc[i] >> 47)) ^ read64(secret + 8 * i)) * P32_1;
}

/* The secret that belongs to a seed; of use for inputs over 240 bytes, and the same for all blocks of a prompt. */
static void xxh3_long_secret(u64 seed, uint8_t *secret) {
  for (size_t at = 0; at < SECRET_BYTES; at += 16) {
    u64 low = secret64(at) + seed, high = secret64(at + 8) - seed;
    memcpy(secret + at, &low, 8);
    memcpy(secret + at + 8, &high, 8);
  }
}

static u64 xxh3_long(const uint8_t *in, size_t len, const uint8_t *secret) {
  u64 acc[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
  size_t block = STRIPE * STRIPES_PER_BLOCK, blocks = (len - 1) / block;
  for (size_t b = 0; b < blocks; b++) {
    for (size_t i = 0; i < STRIPES_PER_BLOCK; i++) accumulate(acc, in + b * block + i * STRIPE, secret + 8 * i);
    scramble(acc, secret + SECRET_BYTES - STRIPE);
  }
  size_t stripes = (len - 1 - blocks * block) / STRIPE;
  for (size_t i = 0; i < stripes; i++) accumulate(acc, in + blocks * block + i * STRIPE, secret + 8 * i);
  accumulate(acc, in + len - STRIPE, secret + SECRET_BYTES - STRIPE - 7);
  u64 sum = len * P64_1;
  for (int i = 0; i < 4; i++)
    sum += mul_fold(acc[2 * i] ^ read64(secret + 11 + 16 * i), acc[2 * i + 1] ^ read64(secret + 19 + 16 * i));
  return avalanche(sum);
}

static inline u64 xxh3_short(const uint8_t *in, size_t len, u64 seed) {
  if (len <= 8) return xxh3_0to8(in, len, seed);
  if (len <= 16) return xxh3_9to16(in, len, seed);
  if (len <= 128) return xxh3_17to128(in, len, seed);
  return xxh3_129to240(in, len, seed);
}

/* One hash for each of `count` pieces of `width` bytes that begin `stride` bytes apart. */
static void hash_pieces(const uint8_t *in, size_t count, size_t width, size_t stride, u64 seed, u64 *out) {
  if (width == 64) {
    for (size_t i = 0; i < count; i++) out[i] = xxh3_17to128(in + i * stride, 64, seed);
  } else if (width <= 240) {
    for (size_t i = 0; i < count; i++) out[i] = xxh3_short(in + i * stride, width, seed);
  } else {
    uint8_t secret[SECRET_BYTES];
    xxh3_long_secret(seed, secret);
    for (size_t i = 0; i < count; i++) out[i] = xxh3_long(in + i * stride, width, secret);
  }
}

/* out[i] names block i and all before it; `local` and `out` may be the same memory. */
static void chain_hashes(const u64 *local, size_t count, u64 seed, int has_parent, u64 parent, u64 *out) {
  for (size_t i = 0; i < count; i++) {
    u64 pair[2] = {parent, local[i]};
    parent = out[i] = (i || has_parent) ? xxh3_9to16((const uint8_t *)pair, 16, seed) : local[i];
  }
}
#endif
