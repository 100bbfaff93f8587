/* Questions to the index: how much of a prompt each slot holds, and all that one slot holds.
 *
 * A lookup walks the prompt block by block and carries the bitmap of the columns that have held every block so far; it
 * looks at the bitmap only where two neighbouring blocks have different sets. Must never change what the index holds: with
 * a limit it notes the use of blocks, nothing else. Functions that run out of memory return -1.
 */
#ifndef HOLDFAST_LOOKUP_H
#define HOLDFAST_LOOKUP_H
#include "index.h"

static inline u32 set_at(const index_t *x, u32 e) {
  if (e == NONE) return 0;
  const entry *p = entry_at(&x->entries, e);
  return is_stale(x, p) ? 0 : p->set;
}

static inline void see(index_t *x, u32 slot) { x->seen[slot >> 6] |= 1ULL << (slot & 63); }

/* Lets the nearest tier below `tier` that holds this block go on from block `at`. */
static u64 run_continue(index_t *x, u32 slot, u32 tier, u32 set, u32 at) {
  while (++tier < TIERS) {
    u32 column = x->slots[slot].column[tier];
    if (column == NONE || !set_has(&x->sets, set, column)) continue;
    x->columns[column].start = at;
    x->active[column >> 6] |= 1ULL << (column & 63);
    return 1;
  }
  return 0;
}

/* Starts the runs of a prompt at its first block; returns whether there is any. */
static u64 run_start(index_t *x, u32 set) {
  const u64 *bits = set_bits(&x->sets, set);
  u64 any = 0;
  for (u32 q = 0; q < x->sets.words; q++) {
    any |= x->active[q] = bits[q] & x->alive[q] & x->near[q];
    for (u64 left = x->active[q]; left; left &= left - 1) {
      u32 column = q * 64 + (u32)__builtin_ctzll(left);
      x->columns[column].start = 0, see(x, x->columns[column].slot);
    }
  }
  if (!x->far_columns) return any;
  for (u32 q = 0; q < x->sets.words; q++)
    for (u64 left = bits[q] & x->alive[q] & ~x->near[q]; left; left &= left - 1) {
      u32 slot = x->columns[q * 64 + (u32)__builtin_ctzll(left)].slot;
      if (x->seen[slot >> 6] >> (slot & 63) & 1) continue;
      see(x, slot), any |= run_continue(x, slot, 0, set, 0);
    }
  return any;
}

/* Ends the runs of columns that lack block `at`; returns whether any run goes on. */
static u64 run_advance(index_t *x, u32 set, u32 at) {
  const u64 *bits = set_bits(&x->sets, set);
  u64 any = 0;
  for (u32 q = 0; q < x->sets.words; q++) {
    u64 ended = x->active[q] & ~bits[q];
    x->active[q] &= bits[q];
    for (; ended; ended &= ended - 1) {
      column_record *c = &x->columns[q * 64 + (u32)__builtin_ctzll(ended)];
      x->slots[c->slot].run[c->tier] = at - c->start;
      if (x->far_columns) any |= run_continue(x, c->slot, c->tier, set, at);
    }
    any |= x->active[q];
  }
  return any;
}

/* Writes one row for each slot seen, by slot; returns how many. */
static u32 emit_rows(index_t *x) {
  u32 rows = 0;
  for (u32 q = 0; q < x->slot_count / 64; q++) {
    for (u64 left = x->seen[q]; left; left &= left - 1) {
      u32 slot = q * 64 + (u32)__builtin_ctzll(left), *run = x->slots[slot].run, *row = x->rows + 4ULL * rows++;
      row[0] = slot;
      memcpy(row + 1, run, sizeof x->slots[slot].run);
      memset(run, 0, sizeof x->slots[slot].run);
    }
    x->seen[q] = 0;
  }
  return rows;
}

/* Marks blocks as used, the last first, so that the beginning of a prompt is never older than its continuation. */
static void touch_trail(index_t *x, size_t count) {
  while (count--) {
    entry *p = entry_at(&x->entries, x->trail[count]);
    if (p->stamp + 2 >= x->generation) entry_touch(x, p, 0);
  }
}

static int trail_reserve(index_t *x, size_t count) {
  if (!x->limit || count <= x->trail_capacity) return 0;
  if (regrow((void **)&x->trail, count * 4)) return -1;
  x->trail_capacity = count;
  return 0;
}

/* Blocks that each slot holds from the first on without a gap, in the nearest tier and then in those below. */
static int find_run(index_t *x, const u64 *keys, size_t count, u32 *rows) {
  *rows = 0;
  if (!count || !x->slot_count) return 0;
  if (trail_reserve(x, count)) return -1;
  walk w;
  walk_start(&w, keys, count, 1);
  u64 hash;
  u32 e = walk_next(&x->entries, &w, &hash), current = set_at(x, e), at = 0;
  u64 any = current ? run_start(x, current) : 0;
  while (any) {
    if (x->limit) x->trail[at] = e;
    if (++at == count) break;
    e = walk_next(&x->entries, &w, &hash);
    u32 set = set_at(x, e);
    if (set != current) any = run_advance(x, current = set, at);
  }
  if (any) run_advance(x, 0, at);
  if (x->limit) touch_trail(x, at);
  *rows = emit_rows(x);
  return 0;
}

static void count_members(index_t *x, u32 set, u32 times) {
  const u64 *bits = set_bits(&x->sets, set);
  for (u32 q = 0; q < x->sets.words; q++)
    for (u64 left = bits[q] & x->alive[q]; left; left &= left - 1) {
      column_record *c = &x->columns[q * 64 + (u32)__builtin_ctzll(left)];
      x->slots[c->slot].run[c->tier] += times, see(x, c->slot);
    }
}

/* Blocks that each slot holds anywhere in the prompt, by tier; a block in two tiers counts in both. */
static int find_anywhere(index_t *x, const u64 *keys, size_t count, u32 *rows) {
  *rows = 0;
  if (!count || !x->slot_count) return 0;
  if (trail_reserve(x, count)) return -1;
  walk w;
  walk_start(&w, keys, count, 1);
  u32 current = 0, times = 0;
  size_t found = 0;
  while (w.at < count) {
    u64 hash;
    u32 e = walk_next(&x->entries, &w, &hash), set = set_at(x, e);
    if (set && x->limit) x->trail[found++] = e;
    if (set != current) count_members(x, current, times), current = set, times = 0;
    times++;
  }
  count_members(x, current, times);
  touch_trail(x, found);
  *rows = emit_rows(x);
  return 0;
}

/* Writes what a column holds, in the order of storing, as often as it was stored. */
static void index_dump(const index_t *x, u32 column, u64 *out) {
  u32 last = 0;
  int member = 0;
  for (u32 e = 0; e < x->entries.top; e++) {
    const entry *p = entry_at(&x->entries, e);
    if (!p->set || is_stale(x, p)) continue;
    if (p->set != last) last = p->set, member = set_has(&x->sets, last, column);
    if (!member) continue;
    *out++ = p->key;
    for (u32 more = repeat_count(&x->entries, p->key, column); more; more--) *out++ = p->key;
  }
}

/* Writes each block of a column once, among the entries from `at` up to `stop`; returns how many. */
static u64 index_scan(const index_t *x, u32 column, u32 at, u32 stop, u64 *out) {
  u32 last = 0;
  int member = 0;
  u64 *begin = out;
  for (u32 e = at; e < stop; e++) {
    const entry *p = entry_at(&x->entries, e);
    if (!p->set || is_stale(x, p)) continue;
    if (p->set != last) last = p->set, member = set_has(&x->sets, last, column);
    if (member) *out++ = p->key;
  }
  return (u64)(out - begin);
}
#endif
