/* Where the blocks are kept: entries in chunks that never move, found through 256 small hash tables.
 *
 * Entries are handed out in the order of storing, so the blocks of a chain lie side by side: a walk along a prompt finds
 * most of its blocks at "the next entry", without hashing. The tables grow one by one; no single call rehashes
 * everything. `repeats` counts how often a block was stored beyond the first time by one column.
 * Must never be used from two threads at once. Functions that can run out of memory return nonzero or NONE then.
 */
#ifndef HOLDFAST_ENTRIES_H
#define HOLDFAST_ENTRIES_H
#include "sets.h"

#define CHUNK_BITS 16
#define CHUNK (1U << CHUNK_BITS)
#define SHARDS 256
#define BATCH 32

typedef struct {
  u64 key;
  u32 set;   /* 0: the entry is free */
  u32 stamp; /* generation of the last use; of a free entry: the next free one */
} entry;

typedef struct {
  u64 *slots; /* tag << 32 | entry + 1; 0 = empty */
  u32 mask, used;
} shard;

typedef struct {
  u64 key;
  u32 column, count; /* count 0: empty */
} repeat;

typedef struct {
  entry **chunks;
  u32 chunk_count, chunk_capacity, top, free;
  u64 used;
  shard shards[SHARDS];
  repeat *repeats;
  u32 repeat_mask, repeat_used;
} entries;

static inline u64 key_hash(u64 key) {
  key ^= key >> 32;
  key *= 0x9E3779B97F4A7C15ULL;
  return key ^ (key >> 29);
}
static inline entry *entry_at(const entries *t, u32 e) { return &t->chunks[e >> CHUNK_BITS][e & (CHUNK - 1)]; }
static inline shard *shard_of(entries *t, u64 hash) { return &t->shards[hash >> 56]; }
static inline u32 tag_of(u64 hash) { return (u32)(hash >> 24); }

static int entries_init(entries *t) {
  memset(t, 0, sizeof *t);
  t->free = NONE, t->repeat_mask = 63;
  t->repeats = calloc(t->repeat_mask + 1, sizeof(repeat));
  if (!t->repeats) return -1;
  for (int i = 0; i < SHARDS; i++) {
    t->shards[i].mask = 15;
    if (!(t->shards[i].slots = calloc(16, 8))) return -1;
  }
  return 0;
}

static void entries_free(entries *t) {
  for (u32 i = 0; i < t->chunk_count; i++) free(t->chunks[i]);
  for (int i = 0; i < SHARDS; i++) free(t->shards[i].slots);
  free(t->chunks), free(t->repeats);
}

static u64 entries_bytes(const entries *t) {
  u64 bytes = (u64)t->chunk_count * CHUNK * sizeof(entry) + 8ULL * t->chunk_capacity;
  for (int i = 0; i < SHARDS; i++) bytes += 8ULL * (t->shards[i].mask + 1ULL);
  return bytes + sizeof(repeat) * (t->repeat_mask + 1ULL);
}

static inline u32 entry_find(entries *t, u64 key, u64 hash) {
  const shard *s = shard_of(t, hash);
  u32 tag = tag_of(hash);
  for (u32 i = tag & s->mask;; i = (i + 1) & s->mask) {
    u64 slot = s->slots[i];
    if (!slot) return NONE;
    if ((u32)(slot >> 32) == tag && entry_at(t, (u32)slot - 1)->key == key) return (u32)slot - 1;
  }
}

static inline void shard_put(shard *s, u64 slot) {
  u32 i = (u32)(slot >> 32) & s->mask;
  while (s->slots[i]) i = (i + 1) & s->mask;
  s->slots[i] = slot;
}

static int shard_resize(shard *s, u32 mask) {
  u32 old_mask = s->mask;
  u64 *old = s->slots, *slots = calloc(mask + 1ULL, 8);
  if (!slots) return -1;
  s->slots = slots, s->mask = mask;
  for (u32 i = 0; i <= old_mask; i++)
    if (old[i]) shard_put(s, old[i]);
  free(old);
  return 0;
}

static void shard_delete(shard *s, u32 tag, u32 e) {
  u32 i = tag & s->mask;
  while ((u32)s->slots[i] != e + 1) i = (i + 1) & s->mask;
  for (u32 j = i;;) {
    j = (j + 1) & s->mask;
    u64 slot = s->slots[j];
    if (!slot) break;
    u32 home = (u32)(slot >> 32) & s->mask;
    if (((j - home) & s->mask) >= ((j - i) & s->mask)) s->slots[i] = slot, i = j;
  }
  s->slots[i] = 0;
  s->used--;
}

#define SAMPLE 64

/* Before many hashes come at once (a snapshot): grows the tables in one step, as far as a sample of them is new. */
static int entries_expect(entries *t, const u64 *keys, size_t count) {
  size_t fresh = 0, every = count / SAMPLE;
  for (size_t i = 0; i < SAMPLE; i++) fresh += entry_find(t, keys[i * every], key_hash(keys[i * every])) == NONE;
  u64 expected = (t->used + count / SAMPLE * fresh) / SHARDS;
  for (int i = 0; i < SHARDS; i++) {
    shard *s = &t->shards[i];
    u32 mask = s->mask;
    while (expected * 4 > (mask + 1ULL) * 3 && mask < NONE / 4) mask = 2 * mask + 1;
    if (mask != s->mask && shard_resize(s, mask)) return -1;
  }
  return 0;
}

/* Makes sure that the next entry_new succeeds. */
static inline int entry_reserve(entries *t, u64 hash) {
  shard *s = shard_of(t, hash);
  if ((s->used + 1) * 4ULL > (s->mask + 1ULL) * 3 && shard_resize(s, 2 * s->mask + 1)) return -1;
  if (t->free != NONE || (t->top >> CHUNK_BITS) < t->chunk_count) return 0;
  if (t->top >= NONE - CHUNK) return -1;
  if (t->chunk_count == t->chunk_capacity) {
    u32 more = t->chunk_capacity ? t->chunk_capacity * 2 : 16;
    if (regrow((void **)&t->chunks, more * sizeof(entry *))) return -1;
    t->chunk_capacity = more;
  }
  entry *chunk = malloc(sizeof(entry) * CHUNK);
  if (!chunk) return -1;
  t->chunks[t->chunk_count++] = chunk;
  return 0;
}

static inline u32 entry_new(entries *t, u64 key, u64 hash) {
  u32 e = t->free;
  if (e != NONE) t->free = entry_at(t, e)->stamp;
  else e = t->top++;
  entry_at(t, e)->key = key;
  shard_put(shard_of(t, hash), ((u64)tag_of(hash) << 32) | (e + 1));
  shard_of(t, hash)->used++;
  t->used++;
  return e;
}

static void entry_delete(entries *t, u32 e) {
  entry *p = entry_at(t, e);
  u64 hash = key_hash(p->key);
  shard_delete(shard_of(t, hash), tag_of(hash), e);
  p->set = 0, p->stamp = t->free, t->free = e;
  t->used--;
}

/* A walk along the hashes of a prompt or an event; tries the neighbour of the last entry before it hashes. */
typedef struct {
  const u64 *keys;
  size_t count, at, batch_begin, batch_end;
  u32 last, step;
  u64 hash[BATCH];
} walk;

/* `step`: how far to look ahead at first; it doubles as long as neighbours do not help. */
static inline void walk_start(walk *w, const u64 *keys, size_t count, u32 step) {
  w->keys = keys, w->count = count, w->at = w->batch_begin = w->batch_end = 0, w->last = NONE, w->step = step;
}

static void walk_batch(entries *t, walk *w) {
  w->step = w->step * 2 < BATCH ? w->step * 2 : BATCH;
  size_t n = w->count - w->at < w->step ? w->count - w->at : w->step;
  w->batch_begin = w->at, w->batch_end = w->at + n;
  for (size_t j = 0; j < n; j++) {
    w->hash[j] = key_hash(w->keys[w->at + j]);
    shard *s = shard_of(t, w->hash[j]);
    __builtin_prefetch(&s->slots[tag_of(w->hash[j]) & s->mask]);
  }
  for (size_t j = 0; j < n; j++) {
    shard *s = shard_of(t, w->hash[j]);
    u64 slot = s->slots[tag_of(w->hash[j]) & s->mask];
    if (slot) __builtin_prefetch(entry_at(t, (u32)slot - 1));
  }
}

/* Returns the entry of the next hash or NONE; `hash` gets its key_hash when it is NONE. */
static inline u32 walk_next(entries *t, walk *w, u64 *hash) {
  u64 key = w->keys[w->at];
  if (w->last != NONE && w->last + 1 < t->top) {
    const entry *p = entry_at(t, w->last + 1);
    if (p->key == key && p->set) return w->at++, w->step = 1, ++w->last;
  }
  if (w->at < w->batch_begin || w->at >= w->batch_end) walk_batch(t, w);
  *hash = w->hash[w->at++ - w->batch_begin];
  return w->last = entry_find(t, key, *hash);
}

static inline u32 repeat_place(const entries *t, u64 key, u32 column) {
  return (u32)(key_hash(key ^ column_hash(column)) >> 20) & t->repeat_mask;
}

static u32 repeat_find(const entries *t, u64 key, u32 column) {
  u32 i = repeat_place(t, key, column);
  while (t->repeats[i].count && (t->repeats[i].key != key || t->repeats[i].column != column)) i = (i + 1) & t->repeat_mask;
  return i;
}

static int repeat_add(entries *t, u64 key, u32 column) {
  u32 i = repeat_find(t, key, column);
  if (t->repeats[i].count) return t->repeats[i].count += t->repeats[i].count < NONE, 0;
  if (++t->repeat_used * 10ULL > t->repeat_mask * 7ULL) {
    repeat *old = t->repeats, *table = calloc(2 * (t->repeat_mask + 1ULL), sizeof(repeat));
    if (!table) return t->repeat_used--, -1;
    u32 old_mask = t->repeat_mask;
    t->repeats = table, t->repeat_mask = 2 * old_mask + 1;
    for (u32 j = 0; j <= old_mask; j++)
      if (old[j].count) table[repeat_find(t, old[j].key, old[j].column)] = old[j];
    free(old);
    i = repeat_find(t, key, column);
  }
  t->repeats[i] = (repeat){key, column, 1};
  return 0;
}

/* Takes away up to `count` repeats and returns how many there were to take. */
static u32 repeat_take(entries *t, u64 key, u32 column, u32 count) {
  if (!t->repeat_used) return 0;
  u32 i = repeat_find(t, key, column), had = t->repeats[i].count;
  if (!had) return 0;
  if (had > count) return t->repeats[i].count -= count, count;
  for (u32 j = i;;) {
    j = (j + 1) & t->repeat_mask;
    if (!t->repeats[j].count) break;
    u32 home = repeat_place(t, t->repeats[j].key, t->repeats[j].column);
    if (((j - home) & t->repeat_mask) >= ((j - i) & t->repeat_mask)) t->repeats[i] = t->repeats[j], i = j;
  }
  t->repeats[i].count = 0;
  t->repeat_used--;
  return had;
}

static inline u32 repeat_count(const entries *t, u64 key, u32 column) {
  return t->repeat_used ? t->repeats[repeat_find(t, key, column)].count : 0;
}
#endif
