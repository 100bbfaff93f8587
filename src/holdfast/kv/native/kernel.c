/* The Python module holdfast.kv._kernel: block hashes and the prefix index, compiled.
 *
 * Uses the stable ABI of Python 3.11, so one build serves all later versions. Every function checks its arguments before
 * it changes anything and keeps the interpreter's lock: calls take microseconds. kernel.py gives it its types.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "lookup.h"

#define VERSION 2 /* of what kernel.py expects; raise both together */
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST ""
#endif

typedef struct {
  Py_buffer view;
  const u64 *data;
  size_t count;
  void *copy; /* of a buffer that is not aligned */
} words;

static int words_get(PyObject *from, words *w) {
  if (PyObject_GetBuffer(from, &w->view, PyBUF_SIMPLE)) return -1;
  w->copy = NULL, w->data = w->view.buf, w->count = (size_t)w->view.len / 8;
  if (w->view.len % 8) {
    PyErr_Format(PyExc_ValueError, "expected 64-bit numbers, got %zd bytes, which is no multiple of 8", w->view.len);
  } else if (w->count >= NONE) {
    PyErr_Format(PyExc_ValueError, "%zu hashes in one call; at most 4294967294 are possible", w->count);
  } else if ((uintptr_t)w->view.buf % 8 == 0) {
    return 0;
  } else if ((w->copy = malloc((size_t)w->view.len + 1))) {
    w->data = memcpy(w->copy, w->view.buf, (size_t)w->view.len);
    return 0;
  } else {
    PyErr_NoMemory();
  }
  PyBuffer_Release(&w->view);
  return -1;
}

static void words_release(words *w) {
  free(w->copy);
  PyBuffer_Release(&w->view);
}

static PyObject *arguments_wrong(const char *usage) {
  PyErr_Format(PyExc_TypeError, "usage: %s", usage);
  return NULL;
}

/* ---- hashing ---- */

static PyObject *hash_pieces_py(PyObject *module, PyObject *const *args, Py_ssize_t n) {
  (void)module;
  if (n != 4) return arguments_wrong("hash_pieces(tokens, width, stride, seed): bytes of 64-bit hashes");
  Py_ssize_t width = PyLong_AsSsize_t(args[1]), stride = PyLong_AsSsize_t(args[2]);
  u64 seed = PyLong_AsUnsignedLongLong(args[3]);
  if (PyErr_Occurred()) return NULL;
  if (width < 1 || stride < 1) return PyErr_SetString(PyExc_ValueError, "width and stride are at least one byte"), NULL;
  Py_buffer view;
  if (PyObject_GetBuffer(args[0], &view, PyBUF_SIMPLE)) return NULL;
  Py_ssize_t count = view.len < width ? 0 : (view.len - width) / stride + 1;
  PyObject *out = PyBytes_FromStringAndSize(NULL, count * 8);
  if (out) hash_pieces(view.buf, (size_t)count, (size_t)width, (size_t)stride, seed, (u64 *)PyBytes_AsString(out));
  PyBuffer_Release(&view);
  return out;
}

static PyObject *chain_py(PyObject *module, PyObject *const *args, Py_ssize_t n) {
  (void)module;
  if (n != 3) return arguments_wrong("chain(local, seed, parent or None): bytes of 64-bit hashes");
  u64 seed = PyLong_AsUnsignedLongLong(args[1]), parent = args[2] == Py_None ? 0 : PyLong_AsUnsignedLongLong(args[2]);
  words local;
  if (PyErr_Occurred() || words_get(args[0], &local)) return NULL;
  PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)local.count * 8);
  if (out) chain_hashes(local.data, local.count, seed, args[2] != Py_None, parent, (u64 *)PyBytes_AsString(out));
  words_release(&local);
  return out;
}

/* ---- the index ---- */

typedef struct {
  PyObject_HEAD
  index_t index;
} Index;

static index_t *of(PyObject *self) { return &((Index *)self)->index; }

static PyObject *Index_new(PyTypeObject *type, PyObject *args, PyObject *named) {
  static char *names[] = {"limit", NULL};
  unsigned long long limit = 0;
  if (!PyArg_ParseTupleAndKeywords(args, named, "|K", names, &limit)) return NULL;
  allocfunc make = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
  PyObject *self = make(type, 0);
  if (self && index_init(of(self), limit)) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return self;
}

static void Index_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  index_free(of(self));
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  release(self);
  Py_DECREF(type);
}

static int read_slot(PyObject *from, u32 *slot) {
  long value = PyLong_AsLong(from);
  if (value == -1 && PyErr_Occurred()) return -1;
  if (value < 0 || value >= SLOTS) return PyErr_Format(PyExc_ValueError, "slot %ld is not in 0..%d", value, SLOTS - 1), -1;
  return *slot = (u32)value, 0;
}

static int read_tier(PyObject *from, u32 *tier) {
  long value = PyLong_AsLong(from);
  if (value == -1 && PyErr_Occurred()) return -1;
  if (value < 0 || value >= TIERS) return PyErr_Format(PyExc_ValueError, "tier %ld is not in 0..%d", value, TIERS - 1), -1;
  return *tier = (u32)value, 0;
}

typedef int (*event)(index_t *, u32, u32, const u64 *, size_t);

static PyObject *one_event(PyObject *self, PyObject *const *args, Py_ssize_t n, event apply) {
  u32 slot, tier;
  words keys;
  if (n != 3) return arguments_wrong("(slot, tier, hashes)");
  if (read_slot(args[0], &slot) || read_tier(args[1], &tier) || words_get(args[2], &keys)) return NULL;
  int failed = apply(of(self), slot, tier, keys.data, keys.count);
  words_release(&keys);
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

static PyObject *Index_apply_stored(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  return one_event(self, args, n, index_store);
}
static PyObject *Index_apply_removed(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  return one_event(self, args, n, index_remove);
}

static void index_clear(index_t *x, u32 slot) {
  for (u32 tier = 0; tier < TIERS; tier++) index_retire(x, slot, tier);
  if (slot < x->slot_count) x->slots[slot].forgotten = x->slots[slot].unknown = 0;
}

static PyObject *Index_clear(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  u32 slot, tier;
  if (n != 1 && n != 2) return arguments_wrong("clear(slot, tier=None)");
  if (read_slot(args[0], &slot)) return NULL;
  if (n == 1 || args[1] == Py_None) index_clear(of(self), slot);
  else if (read_tier(args[1], &tier)) return NULL;
  else index_retire(of(self), slot, tier);
  Py_RETURN_NONE;
}

enum { STORED, REMOVED, CLEARED };

static int batch_check(const words *events, const words *hashes) {
  u64 total = 0;
  for (size_t i = 0; i + 3 < events->count; i += 4) {
    const u64 *v = events->data + i;
    if (v[0] > CLEARED || v[1] >= SLOTS || v[2] >= TIERS || v[3] > hashes->count || (v[0] == CLEARED && v[3])) {
      PyErr_Format(PyExc_ValueError, "event %zu is not (0 stored, 1 removed, 2 cleared; slot; tier; count of hashes): %llu %llu %llu %llu",
                   i / 4, (unsigned long long)v[0], (unsigned long long)v[1], (unsigned long long)v[2], (unsigned long long)v[3]);
      return -1;
    }
    total += v[3];
  }
  if (events->count % 4 == 0 && total == hashes->count) return 0;
  PyErr_Format(PyExc_ValueError, "%zu numbers of events for %llu hashes, but %zu hashes came", events->count,
               (unsigned long long)total, hashes->count);
  return -1;
}

static int batch_apply(index_t *x, const words *events, const words *hashes) {
  const u64 *keys = hashes->data;
  for (size_t i = 0; i < events->count; i += 4) {
    const u64 *v = events->data + i;
    u32 slot = (u32)v[1], tier = (u32)v[2];
    if (v[0] == CLEARED) index_retire(x, slot, tier);
    else if ((v[0] == STORED ? index_store : index_remove)(x, slot, tier, keys, (size_t)v[3])) return -1;
    keys += v[3];
  }
  return 0;
}

static PyObject *Index_apply(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  words events, hashes;
  if (n != 2) return arguments_wrong("apply(events, hashes)");
  if (words_get(args[0], &events)) return NULL;
  if (words_get(args[1], &hashes)) return words_release(&events), NULL;
  int bad = batch_check(&events, &hashes), failed = bad ? 0 : batch_apply(of(self), &events, &hashes);
  words_release(&events), words_release(&hashes);
  if (bad) return NULL;
  if (failed) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

typedef int (*finder)(index_t *, const u64 *, size_t, u32 *);

static PyObject *find(PyObject *self, PyObject *hashes, finder how) {
  words keys;
  u32 rows;
  if (words_get(hashes, &keys)) return NULL;
  int failed = how(of(self), keys.data, keys.count, &rows);
  words_release(&keys);
  if (failed) return PyErr_NoMemory();
  return PyBytes_FromStringAndSize(rows ? (const char *)of(self)->rows : NULL, (Py_ssize_t)rows * 16);
}

static PyObject *Index_find_run(PyObject *self, PyObject *hashes) { return find(self, hashes, find_run); }
static PyObject *Index_find_anywhere(PyObject *self, PyObject *hashes) { return find(self, hashes, find_anywhere); }

static PyObject *Index_dump(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  index_t *x = of(self);
  u32 slot, tier, column = NONE;
  if (n != 2) return arguments_wrong("dump(slot, tier)");
  if (read_slot(args[0], &slot) || read_tier(args[1], &tier)) return NULL;
  if (x->limit) index_sweep(x, ~0ULL);
  if (slot < x->slot_count) column = x->slots[slot].column[tier];
  u64 count = column == NONE ? 0 : x->columns[column].blocks + x->columns[column].repeats;
  PyObject *out = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * 8));
  if (out && count) index_dump(x, column, (u64 *)PyBytes_AsString(out));
  return out;
}

/* Entries never move: a block that is held all the while is found exactly once by scans from 0 to the end. */
static PyObject *Index_scan(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  index_t *x = of(self);
  u32 slot, tier, column = NONE, top = x->entries.top;
  if (n != 4) return arguments_wrong("scan(slot, tier, at, budget): (bytes, next or -1)");
  if (read_slot(args[0], &slot) || read_tier(args[1], &tier)) return NULL;
  unsigned long at = PyLong_AsUnsignedLong(args[2]), budget = PyLong_AsUnsignedLong(args[3]);
  if (PyErr_Occurred()) return NULL;
  if (slot < x->slot_count) column = x->slots[slot].column[tier];
  u32 from = at < top ? (u32)at : top, stop = budget < top - from ? from + (u32)budget : top;
  if (column == NONE) from = stop = top;
  u64 *found = malloc((stop - from) * 8ULL + 1), count;
  if (!found) return PyErr_NoMemory();
  count = index_scan(x, column, from, stop, found);
  PyObject *out = Py_BuildValue("(y#L)", (const char *)found, (Py_ssize_t)(count * 8), stop < top ? (long long)stop : -1LL);
  free(found);
  return out;
}

static PyObject *Index_tally(PyObject *self, PyObject *arg) {
  index_t *x = of(self);
  u32 slot;
  u64 blocks[TIERS] = {0}, repeats = 0, forgotten = 0, unknown = 0;
  if (read_slot(arg, &slot)) return NULL;
  if (slot < x->slot_count) {
    for (u32 tier = 0; tier < TIERS; tier++) {
      u32 column = x->slots[slot].column[tier];
      if (column != NONE) blocks[tier] = x->columns[column].blocks, repeats += x->columns[column].repeats;
    }
    forgotten = x->slots[slot].forgotten, unknown = x->slots[slot].unknown;
  }
  return Py_BuildValue("(KKKKKK)", blocks[0], blocks[1], blocks[2], repeats, forgotten, unknown);
}

static PyObject *Index_sweep(PyObject *self, PyObject *budget) {
  u64 most = budget == Py_None ? ~0ULL : PyLong_AsUnsignedLongLong(budget);
  if (PyErr_Occurred()) return NULL;
  return PyBool_FromLong(index_sweep(of(self), most));
}

static PyObject *Index_bytes(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromUnsignedLongLong(index_bytes(of(self)));
}
static PyObject *Index_blocks(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromUnsignedLongLong(of(self)->entries.used);
}
static PyObject *Index_sets(PyObject *self, void *unused) {
  (void)unused;
  return PyLong_FromUnsignedLong(of(self)->sets.live);
}

#define FAST(name) (PyCFunction)(void (*)(void)) name, METH_FASTCALL
static PyMethodDef index_methods[] = {
    {"apply_stored", FAST(Index_apply_stored), NULL},
    {"apply_removed", FAST(Index_apply_removed), NULL},
    {"apply", FAST(Index_apply), NULL},
    {"clear", FAST(Index_clear), NULL},
    {"find_run", Index_find_run, METH_O, NULL},
    {"find_anywhere", Index_find_anywhere, METH_O, NULL},
    {"dump", FAST(Index_dump), NULL},
    {"scan", FAST(Index_scan), NULL},
    {"tally", Index_tally, METH_O, NULL},
    {"sweep", Index_sweep, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};
static PyGetSetDef index_values[] = {
    {"bytes_used", Index_bytes, NULL, NULL, NULL},
    {"blocks", Index_blocks, NULL, NULL, NULL},
    {"sets", Index_sets, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyType_Slot index_slots[] = {
    {Py_tp_new, Index_new}, {Py_tp_dealloc, Index_dealloc}, {Py_tp_methods, index_methods}, {Py_tp_getset, index_values}, {0, NULL},
};
static PyType_Spec index_spec = {"holdfast.kv._kernel.Index", sizeof(Index), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, index_slots};

static PyMethodDef module_functions[] = {
    {"hash_pieces", FAST(hash_pieces_py), NULL},
    {"chain", FAST(chain_py), NULL},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_kernel", "Block hashes and the prefix index, compiled.", -1, module_functions, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
  PyObject *module = PyModule_Create(&module_def), *type = PyType_FromSpec(&index_spec);
  if (!module || !type || PyModule_AddObjectRef(module, "Index", type) || PyModule_AddIntConstant(module, "VERSION", VERSION) ||
      PyModule_AddStringConstant(module, "SOURCE_DIGEST", SOURCE_DIGEST))
    Py_CLEAR(module);
  Py_XDECREF(type);
  return module;
}
