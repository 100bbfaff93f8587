/* Interned sets of columns (a column stands for one worker, rank and tier): each distinct set exists once.
 *
 * An entry of the index holds a set's number, so the price of a block does not depend on how many workers there are, and
 * "do these two blocks have the same holders?" is one comparison. Sets are counted by the entries that refer to them and
 * freed with the last. Number 0 is the empty set. Must never be used from two threads at once.
 */
#ifndef HOLDFAST_SETS_H
#define HOLDFAST_SETS_H
#include <stdlib.h>

#include "xxh3.h"

#define NONE 0xffffffffU

typedef struct {
  u64 *bits;   /* [capacity][words] */
  u64 *hash;   /* XOR of the members' column_hash; of a freed set: the next free one */
  u32 *refs;   /* entries that refer to the set */
  u32 *size;   /* members */
  u64 *scratch; /* one set under construction */
  u32 *table;  /* open addressing, set number by hash; 0 = empty */
  u32 words, capacity, top, free, live, mask;
  u32 memo_from, memo_column, memo_to; /* the last transition: runs of blocks repeat it */
} sets;

static inline u64 column_hash(u32 column) {
  u64 z = ((u64)column + 1) * 0x9E3779B97F4A7C15ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

static inline u64 *set_bits(const sets *s, u32 set) { return s->bits + (size_t)set * s->words; }
static inline int set_has(const sets *s, u32 set, u32 column) {
  return (int)((set_bits(s, set)[column >> 6] >> (column & 63)) & 1);
}
static inline u32 set_place(const sets *s, u64 hash) { return (u32)(hash >> 20) & s->mask; }

static int sets_init(sets *s) {
  memset(s, 0, sizeof *s);
  s->words = 1, s->capacity = 256, s->top = 1, s->free = NONE, s->mask = 1023, s->memo_column = NONE;
  s->bits = calloc(s->capacity, 8);
  s->hash = calloc(s->capacity, 8);
  s->refs = calloc(s->capacity, 4);
  s->size = calloc(s->capacity, 4);
  s->scratch = calloc(1, 8);
  s->table = calloc(s->mask + 1, 4);
  return s->bits && s->hash && s->refs && s->size && s->scratch && s->table ? 0 : -1;
}

static void sets_free(sets *s) {
  free(s->bits), free(s->hash), free(s->refs), free(s->size), free(s->scratch), free(s->table);
}

static u64 sets_bytes(const sets *s) {
  return (u64)s->capacity * (8ULL * s->words + 16) + 4ULL * (s->mask + 1) + 8ULL * s->words;
}

/* Makes room for more columns: every bitmap gets `words` words. */
static int sets_widen(sets *s, u32 words) {
  u64 *bits = calloc((size_t)s->capacity * words, 8), *scratch = calloc(words, 8);
  if (!bits || !scratch) return free(bits), free(scratch), -1;
  for (u32 i = 0; i < s->top; i++) memcpy(bits + (size_t)i * words, set_bits(s, i), 8ULL * s->words);
  free(s->bits), free(s->scratch);
  s->bits = bits, s->scratch = scratch, s->words = words;
  return 0;
}

static void set_insert(sets *s, u32 set) {
  u32 i = set_place(s, s->hash[set]);
  while (s->table[i]) i = (i + 1) & s->mask;
  s->table[i] = set;
}

static int sets_grow_table(sets *s) {
  u32 old_mask = s->mask, *old = s->table, *table = calloc(2ULL * (old_mask + 1ULL), 4);
  if (!table) return -1;
  s->table = table, s->mask = 2 * old_mask + 1;
  for (u32 i = 0; i <= old_mask; i++)
    if (old[i]) set_insert(s, old[i]);
  free(old);
  return 0;
}

static int regrow(void **memory, size_t bytes) {
  void *more = realloc(*memory, bytes);
  if (!more) return -1;
  *memory = more;
  return 0;
}

static int sets_reserve(sets *s) {
  if (s->live * 2ULL > s->mask && sets_grow_table(s)) return -1;
  if (s->free != NONE || s->top < s->capacity) return 0;
  size_t more = s->capacity * 2ULL;
  if (more >= NONE || regrow((void **)&s->bits, more * s->words * 8) || regrow((void **)&s->hash, more * 8) ||
      regrow((void **)&s->refs, more * 4) || regrow((void **)&s->size, more * 4))
    return -1;
  s->capacity = (u32)more;
  return 0;
}

/* Returns the number of the set in `scratch`, creating it if need be; NONE without memory. The caller takes a reference. */
static u32 set_intern(sets *s, u64 hash, u32 size) {
  if (!size) return 0;
  for (u32 i = set_place(s, hash), set; (set = s->table[i]); i = (i + 1) & s->mask)
    if (s->hash[set] == hash && !memcmp(set_bits(s, set), s->scratch, 8ULL * s->words)) return set;
  if (sets_reserve(s)) return NONE;
  u32 set = s->free;
  if (set != NONE) s->free = (u32)s->hash[set];
  else set = s->top++;
  memcpy(set_bits(s, set), s->scratch, 8ULL * s->words);
  s->hash[set] = hash, s->size[set] = size, s->refs[set] = 0, s->live++;
  set_insert(s, set);
  return set;
}

/* Returns `from` with one column put in or taken out. */
static inline u32 set_toggled(sets *s, u32 from, u32 column) {
  if (s->memo_column == column && s->memo_from == from) return s->memo_to;
  memcpy(s->scratch, set_bits(s, from), 8ULL * s->words);
  int had = set_has(s, from, column);
  s->scratch[column >> 6] ^= 1ULL << (column & 63);
  u32 to = set_intern(s, (from ? s->hash[from] : 0) ^ column_hash(column), (from ? s->size[from] : 0) + (had ? -1 : 1));
  if (to != NONE) s->memo_from = from, s->memo_column = column, s->memo_to = to;
  return to;
}

/* Returns `from` without the columns that are not in `keep`. */
static u32 set_reduced(sets *s, u32 from, const u64 *keep) {
  u64 hash = s->hash[from];
  u32 size = s->size[from];
  const u64 *bits = set_bits(s, from);
  for (u32 q = 0; q < s->words; q++) {
    s->scratch[q] = bits[q] & keep[q];
    for (u64 gone = bits[q] & ~keep[q]; gone; gone &= gone - 1, size--) hash ^= column_hash(q * 64 + (u32)__builtin_ctzll(gone));
  }
  return set_intern(s, hash, size);
}

static void set_drop(sets *s, u32 set) {
  u32 i = set_place(s, s->hash[set]);
  while (s->table[i] != set) i = (i + 1) & s->mask;
  for (u32 j = i;;) { /* deletion from linear probing: move back what would no longer be found */
    j = (j + 1) & s->mask;
    u32 other = s->table[j];
    if (!other) break;
    u32 home = set_place(s, s->hash[other]);
    if (((j - home) & s->mask) >= ((j - i) & s->mask)) s->table[i] = other, i = j;
  }
  s->table[i] = 0;
  if (s->memo_from == set || s->memo_to == set) s->memo_column = NONE;
  s->hash[set] = s->free, s->free = set, s->live--;
}

static inline void set_retain(sets *s, u32 set) { s->refs[set]++; }
static inline void set_release(sets *s, u32 set) {
  if (set && --s->refs[set] == 0) set_drop(s, set);
}
#endif
