/* The prefix index: which slot (worker and rank) holds which block in which tier.
 *
 * docs/explanation/kv-index.md describes the structure; src/holdfast/kv/twin.py is the same in Python, and
 * tests/kv/test_kv_fuzz.py holds one against the other. What is taken back at once costs O(1): a cleared slot's columns are
 * retired, and entries of a generation that has passed its time count as absent; `index_sweep` frees both piece by piece.
 * Must never be used from two threads at once (the interpreter's lock sees to that), and never raise: functions that run
 * out of memory return -1 and leave the index usable.
 */
#ifndef HOLDFAST_INDEX_H
#define HOLDFAST_INDEX_H
#include "entries.h"

#define TIERS 3
#define SLOTS 65536
#define EXPECT_FROM 65536
#define SWEEP_FLOOR 64
#define SWEEP_PER_BLOCK 4

typedef struct {
  u32 column[TIERS]; /* NONE: nothing was stored in that tier */
  u32 run[TIERS];    /* scratch of a lookup */
  u64 forgotten, unknown;
} slot_record;

typedef struct {
  u32 slot, tier, start; /* start: scratch of a lookup */
  u64 blocks, repeats;
} column_record;

typedef struct {
  entries entries;
  sets sets;
  column_record *columns;
  u64 *alive, *near, *active, *seen; /* bitmaps: columns in use; those of tier 0; scratch; slots of a lookup */
  u32 *spare, *retired;              /* columns free for use; columns that entries may still mention */
  u32 column_top, spare_count, retired_count, retired_before_pass, far_columns;
  slot_record *slots;
  u32 slot_count;
  u32 *rows; /* result of a lookup: slot and a count for each tier */
  u32 *trail;
  size_t trail_capacity;
  u64 limit, young, old;
  u32 generation, pass_at, pass_end; /* a sweep's pass visits the entries that there were when it began */
} index_t;

static inline u32 column_capacity(const index_t *x) { return x->sets.words * 64; }
static inline int is_stale(const index_t *x, const entry *p) { return x->limit && p->stamp + 1 < x->generation; }
static inline u64 stale_count(const index_t *x) { return x->entries.used - x->young - x->old; }

static int columns_widen(index_t *x, u32 words) {
  u32 had = x->columns ? x->sets.words : 0;
  u64 **maps[3] = {&x->alive, &x->near, &x->active};
  for (int i = 0; i < 3; i++) {
    if (regrow((void **)maps[i], words * 8ULL)) return -1;
    memset(*maps[i] + had, 0, (words - had) * 8ULL);
  }
  if (regrow((void **)&x->columns, words * 64ULL * sizeof(column_record)) || regrow((void **)&x->spare, words * 256ULL) ||
      regrow((void **)&x->retired, words * 256ULL))
    return -1;
  return words > x->sets.words ? sets_widen(&x->sets, words) : 0;
}

static int index_init(index_t *x, u64 limit) {
  memset(x, 0, sizeof *x);
  x->limit = limit, x->generation = 1;
  int failed = entries_init(&x->entries);
  failed |= sets_init(&x->sets);
  return failed || columns_widen(x, 1) ? -1 : 0;
}

static void index_free(index_t *x) {
  entries_free(&x->entries), sets_free(&x->sets);
  free(x->columns), free(x->alive), free(x->near), free(x->active), free(x->seen), free(x->spare), free(x->retired);
  free(x->slots), free(x->rows), free(x->trail);
}

static u64 index_bytes(const index_t *x) {
  u64 bytes = sizeof *x + entries_bytes(&x->entries) + sets_bytes(&x->sets) + 4ULL * x->trail_capacity;
  bytes += column_capacity(x) * (sizeof(column_record) + 8ULL) + x->sets.words * 24ULL;
  return bytes + x->slot_count * (sizeof(slot_record) + 16ULL) + x->slot_count / 8;
}

static int slots_reserve(index_t *x, u32 slot) {
  if (slot < x->slot_count) return 0;
  u32 more = x->slot_count ? x->slot_count : 64;
  while (more <= slot) more *= 2;
  if (regrow((void **)&x->slots, more * sizeof(slot_record)) || regrow((void **)&x->rows, more * 16ULL) ||
      regrow((void **)&x->seen, more / 8))
    return -1;
  memset(x->seen, 0, more / 8);
  for (u32 i = x->slot_count; i < more; i++) x->slots[i] = (slot_record){{NONE, NONE, NONE}, {0, 0, 0}, 0, 0};
  x->slot_count = more;
  return 0;
}

/* ---- giving back ---- */

/* Drops an entry whose time has passed: every column that still holds it is told that a block was forgotten. */
static void entry_forget(index_t *x, u32 e) {
  entry *p = entry_at(&x->entries, e);
  const u64 *bits = set_bits(&x->sets, p->set);
  for (u32 q = 0; q < x->sets.words; q++)
    for (u64 left = bits[q]; left; left &= left - 1) {
      u32 column = q * 64 + (u32)__builtin_ctzll(left), extra = repeat_take(&x->entries, p->key, column, NONE);
      if (!(x->alive[q] >> (column & 63) & 1)) continue;
      x->columns[column].blocks--, x->columns[column].repeats -= extra;
      x->slots[x->columns[column].slot].forgotten += 1ULL + extra;
    }
  set_release(&x->sets, p->set);
  entry_delete(&x->entries, e);
}

static void entry_drop(index_t *x, u32 e) {
  entry *p = entry_at(&x->entries, e);
  if (p->stamp == x->generation) x->young--;
  else x->old--;
  set_release(&x->sets, p->set);
  entry_delete(&x->entries, e);
}

/* Takes retired columns out of an entry. Without memory for the smaller set the entry is dropped as a whole. */
static void entry_clean(index_t *x, u32 e) {
  entry *p = entry_at(&x->entries, e);
  u64 dead = 0;
  const u64 *bits = set_bits(&x->sets, p->set);
  for (u32 q = 0; q < x->sets.words; q++) dead |= bits[q] & ~x->alive[q];
  if (!dead) return;
  if (x->entries.repeat_used)
    for (u32 q = 0; q < x->sets.words; q++)
      for (u64 left = bits[q] & ~x->alive[q]; left; left &= left - 1)
        repeat_take(&x->entries, p->key, q * 64 + (u32)__builtin_ctzll(left), NONE);
  u32 from = p->set, to = set_reduced(&x->sets, from, x->alive);
  if (to == NONE) { /* the count of the others is kept right; their blocks are unknown from now on */
    if (p->stamp == x->generation) x->young--;
    else x->old--;
    entry_forget(x, e);
  } else if (to == 0) {
    entry_drop(x, e);
  } else {
    set_retain(&x->sets, to), p->set = to, set_release(&x->sets, from);
  }
}

static inline int sweep_due(const index_t *x) { return x->retired_count || stale_count(x); }

/* Visits up to `budget` entries; returns whether more is left to give back. */
static int index_sweep(index_t *x, u64 budget) {
  for (int pass = 0; pass < 3 && sweep_due(x); pass++) { /* one under way, a whole one, one to spare */
    if (x->pass_at == x->pass_end)
      x->pass_at = 0, x->pass_end = x->entries.top, x->retired_before_pass = x->retired_count;
    for (; x->pass_at < x->pass_end && budget; x->pass_at++, budget--) {
      const entry *p = entry_at(&x->entries, x->pass_at);
      if (!p->set) continue;
      if (is_stale(x, p)) entry_forget(x, x->pass_at);
      else if (x->retired_count) entry_clean(x, x->pass_at);
    }
    if (x->pass_at < x->pass_end) return 1;
    for (u32 i = 0; i < x->retired_before_pass; i++) x->spare[x->spare_count++] = x->retired[i];
    x->retired_count -= x->retired_before_pass;
    memmove(x->retired, x->retired + x->retired_before_pass, x->retired_count * 4ULL);
    x->retired_before_pass = 0;
  }
  return sweep_due(x);
}

static void index_retire(index_t *x, u32 slot, u32 tier) {
  if (slot >= x->slot_count) return;
  u32 column = x->slots[slot].column[tier];
  if (column == NONE) return;
  x->slots[slot].column[tier] = NONE;
  x->alive[column >> 6] &= ~(1ULL << (column & 63));
  if (tier) x->far_columns--;
  if (!x->columns[column].blocks) x->spare[x->spare_count++] = column; /* no entry mentions it */
  else x->retired[x->retired_count++] = column;
}

/* ---- events ---- */

static u32 column_for(index_t *x, u32 slot, u32 tier) {
  if (slots_reserve(x, slot)) return NONE;
  u32 column = x->slots[slot].column[tier];
  if (column != NONE) return column;
  if (!x->spare_count && x->column_top == column_capacity(x)) {
    if (x->retired_count * 2 >= column_capacity(x)) index_sweep(x, ~0ULL);
    else if (columns_widen(x, x->sets.words * 2)) return NONE;
  }
  column = x->spare_count ? x->spare[--x->spare_count] : x->column_top++;
  x->columns[column] = (column_record){slot, tier, 0, 0, 0};
  x->alive[column >> 6] |= 1ULL << (column & 63);
  if (tier) x->far_columns++, x->near[column >> 6] &= ~(1ULL << (column & 63));
  else x->near[column >> 6] |= 1ULL << (column & 63);
  return x->slots[slot].column[tier] = column;
}

/* Counts an entry as used now. Half of the limit used since the last turn: the older half has passed its time. */
static inline void entry_touch(index_t *x, entry *p, int is_new) {
  if (!is_new && p->stamp == x->generation) return;
  if (x->limit && x->young >= x->limit / 2) x->generation++, x->old = x->young, x->young = 0;
  if (!is_new && p->stamp + 1 == x->generation) x->old--;
  p->stamp = x->generation, x->young++;
}

static int store_new(index_t *x, walk *w, u64 key, u64 hash, u32 column) {
  if (entry_reserve(&x->entries, hash)) return -1;
  u32 set = set_toggled(&x->sets, 0, column);
  if (set == NONE) return -1;
  w->last = entry_new(&x->entries, key, hash);
  entry *p = entry_at(&x->entries, w->last);
  p->set = set, set_retain(&x->sets, set);
  entry_touch(x, p, 1);
  x->columns[column].blocks++;
  return 0;
}

static inline int store_at(index_t *x, entry *p, u32 column) {
  if (set_has(&x->sets, p->set, column)) {
    if (repeat_add(&x->entries, p->key, column)) return -1;
    x->columns[column].repeats++;
  } else {
    u32 from = p->set, to = set_toggled(&x->sets, from, column);
    if (to == NONE) return -1;
    set_retain(&x->sets, to), p->set = to, set_release(&x->sets, from);
    x->columns[column].blocks++;
  }
  if (x->limit) entry_touch(x, p, 0);
  return 0;
}

static int index_store(index_t *x, u32 slot, u32 tier, const u64 *keys, size_t count) {
  if (!count) return 0;
  u32 column = column_for(x, slot, tier);
  if (column == NONE) return -1;
  if (count >= EXPECT_FROM && !x->limit && entries_expect(&x->entries, keys, count)) return -1;
  walk w;
  walk_start(&w, keys, count, BATCH);
  while (w.at < count) {
    u64 key = keys[w.at], hash = 0;
    u32 e = walk_next(&x->entries, &w, &hash);
    if (e != NONE && is_stale(x, entry_at(&x->entries, e))) {
      hash = key_hash(key);
      entry_forget(x, e);
      e = NONE;
    }
    if (e == NONE ? store_new(x, &w, key, hash, column) : store_at(x, entry_at(&x->entries, e), column)) return -1;
  }
  if (sweep_due(x)) index_sweep(x, SWEEP_FLOOR + SWEEP_PER_BLOCK * (u64)count);
  return 0;
}

/* A removal of something that is not there; whoever was told that blocks were forgotten accounts for it there. */
static void remove_unknown(index_t *x, u32 slot) {
  slot_record *s = &x->slots[slot];
  if (s->forgotten) s->forgotten--;
  else s->unknown++;
}

static int index_remove(index_t *x, u32 slot, u32 tier, const u64 *keys, size_t count) {
  if (!count) return 0;
  if (slots_reserve(x, slot)) return -1;
  u32 column = x->slots[slot].column[tier];
  walk w;
  walk_start(&w, keys, count, BATCH);
  while (w.at < count) {
    u64 key = keys[w.at], hash;
    u32 e = walk_next(&x->entries, &w, &hash);
    if (e != NONE && is_stale(x, entry_at(&x->entries, e))) entry_forget(x, e), e = NONE;
    if (e == NONE || column == NONE || !set_has(&x->sets, entry_at(&x->entries, e)->set, column)) {
      remove_unknown(x, slot);
      continue;
    }
    if (repeat_take(&x->entries, key, column, 1)) {
      x->columns[column].repeats--;
      continue;
    }
    entry *p = entry_at(&x->entries, e);
    u32 from = p->set, to = set_toggled(&x->sets, from, column);
    if (to == NONE) return -1;
    if (to) set_retain(&x->sets, to), p->set = to, set_release(&x->sets, from);
    else entry_drop(x, e);
    x->columns[column].blocks--;
  }
  if (sweep_due(x)) index_sweep(x, SWEEP_FLOOR + SWEEP_PER_BLOCK * (u64)count);
  return 0;
}
#endif
