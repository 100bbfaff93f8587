/* The Python module holdfast.requests._express: the short way of plain tokens, from a worker's frame to its client's socket.
 *
 * `take` does for one `Items` frame what `CallerConnection._on_items` and `Attempt.on_tokens` do, `deliver` what
 * `Generation.deliver`, `StreamedChoice.deliver` and the transport's `write` do, on the same Python objects. Before each
 * token everything that the plain case takes for granted is looked at again; whatever is not plain is left to those
 * methods, untouched. So nothing is remembered here, and nothing has to be told when a stream or a client ends.
 *
 * Uses the stable ABI of Python 3.11 and keeps the interpreter's lock. express.py says what a track is.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <structmember.h>
#include <sys/socket.h>

#define VERSION 1 /* of what express.py expects; raise both together */
#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST ""
#endif
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

enum { REFS = 10 };
typedef struct {
  PyObject_HEAD
  union {
    struct {
      PyObject *generation, *attempt, *reply, *table, *fragments, *prefix, *suffix, *ticks, *burst, *transport;
    };
    PyObject *refs[REFS];
  };
  PyObject *write, *waiting;
  PyObject *empty_since; /* `reply.direct` when the transport was last seen with nothing to send; each write that goes
                            through the reply replaces it by a new object, `ride` forgets it */
  unsigned int until;
  int fd;
  unsigned int *fresh; /* ids that were delivered and not yet asked for */
  size_t fresh_count, fresh_room;
} Track;

static PyTypeObject *track_type;
static struct {
  PyObject *attempt, *closing, *count, *delivered, *direct, *expected, *idle_ticks, *track, *open, *pending, *zero;
} names;

static int track_visit(PyObject *self, visitproc visit, void *arg) {
  Track *track = (Track *)self;
  for (int i = 0; i < REFS; i++) Py_VISIT(track->refs[i]);
  Py_VISIT(track->write);
  Py_VISIT(track->waiting);
  Py_VISIT(track->empty_since);
  Py_VISIT(Py_TYPE(self));
  return 0;
}

static int track_clear(PyObject *self) {
  Track *track = (Track *)self;
  for (int i = 0; i < REFS; i++) Py_CLEAR(track->refs[i]);
  Py_CLEAR(track->write);
  Py_CLEAR(track->waiting);
  Py_CLEAR(track->empty_since);
  return 0;
}

static void track_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  track_clear(self);
  PyMem_Free(((Track *)self)->fresh);
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  release(self);
  Py_DECREF(type);
}

static PyObject *track_new(PyTypeObject *type, PyObject *args, PyObject *named) {
  PyObject *refs[REFS];
  int fd;
  unsigned int until;
  if (named && PyDict_Size(named)) return PyErr_SetString(PyExc_TypeError, "Track takes no keyword arguments"), NULL;
  if (!PyArg_ParseTuple(args, "OOOOO!SSO!OOiI", &refs[0], &refs[1], &refs[2], &refs[3], &PyList_Type, &refs[4], &refs[5],
                        &refs[6], &PyList_Type, &refs[7], &refs[8], &refs[9], &fd, &until))
    return NULL;
  allocfunc make = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
  Track *track = (Track *)make(type, 0);
  if (!track) return NULL;
  for (int i = 0; i < REFS; i++) track->refs[i] = Py_NewRef(refs[i]);
  track->fd = fd, track->until = until;
  track->write = PyObject_GetAttrString(track->transport, "write");
  track->waiting = PyObject_GetAttrString(track->transport, "get_write_buffer_size");
  if (!track->write || !track->waiting) Py_CLEAR(track);
  return (PyObject *)track;
}

static PyObject *track_ride(PyObject *self, PyObject *until) {
  Track *track = (Track *)self;
  unsigned long value = PyLong_AsUnsignedLong(until);
  if (PyErr_Occurred()) return NULL;
  track->until = value > UINT_MAX ? UINT_MAX : (unsigned int)value;
  Py_CLEAR(track->empty_since);
  Py_RETURN_NONE;
}

static PyObject *track_fresh(PyObject *self, PyObject *unused) {
  (void)unused;
  Track *track = (Track *)self;
  PyObject *ids = PyBytes_FromStringAndSize((const char *)track->fresh, (Py_ssize_t)(track->fresh_count * sizeof(unsigned int)));
  if (ids) track->fresh_count = 0;
  return ids;
}

/* Room for so many more ids: 0, or -1. */
static int fresh_room(Track *track, size_t more) {
  if (track->fresh_count + more <= track->fresh_room) return 0;
  size_t room = 2 * (track->fresh_count + more) + 64;
  unsigned int *fresh = PyMem_Realloc(track->fresh, room * sizeof(unsigned int));
  if (!fresh) return PyErr_NoMemory(), -1;
  track->fresh = fresh, track->fresh_room = room;
  return 0;
}

/* ---- looking at Python objects: 1 yes, 0 no, -1 error ---- */

static int is_same(PyObject *of, PyObject *name, PyObject *wanted) {
  PyObject *found = PyObject_GetAttr(of, name);
  if (!found) return -1;
  Py_DECREF(found);
  return found == wanted;
}

static int is_number(PyObject *of, PyObject *name, unsigned long long wanted) {
  PyObject *found = PyObject_GetAttr(of, name);
  if (!found) return -1;
  long long value = PyLong_AsLongLong(found);
  Py_DECREF(found);
  if (value == -1 && PyErr_Occurred()) return -1;
  return value >= 0 && (unsigned long long)value == wanted;
}

/* ---- take ---- */

/* 1: taken; 0: not plain. That the output index is the stream's next one makes it the generation's too. */
static int take_token(Track *track, PyObject *stream, PyObject *touched, unsigned int index, unsigned int token) {
  PyObject *generation = track->generation, *pending = NULL, *number = NULL, *next = NULL;
  int found, failed = 1;
  if (index >= track->until) return 0;
  if ((found = is_number(stream, names.expected, index)) != 1) return found;
  if ((found = is_same(generation, names.attempt, track->attempt)) != 1) return found;
  if (!(pending = PyObject_GetAttr(generation, names.pending))) return -1;
  if (!PyList_CheckExact(pending)) return Py_DECREF(pending), 0;
  if (!(number = PyLong_FromUnsignedLong(token)) || !(next = PyLong_FromUnsignedLongLong(index + 1ULL))) goto done;
  if (PyList_Size(pending)) {
    failed = PyList_Append(pending, number);
  } else {
    Py_DECREF(pending);
    if (!(pending = PyList_New(0)) || PyList_Append(pending, number)) goto done;
    failed = PyObject_SetAttr(generation, names.pending, pending) || PyList_Append(touched, (PyObject *)track);
  }
  failed = failed || PyObject_SetAttr(generation, names.count, next) || PyObject_SetAttr(stream, names.expected, next);
done:
  Py_XDECREF(pending);
  Py_XDECREF(number);
  Py_XDECREF(next);
  return failed ? -1 : 1;
}

static int take_entry(PyObject *table, PyObject *touched, PyObject *rest, unsigned int number, unsigned int index, unsigned int token) {
  PyObject *key = PyLong_FromUnsignedLong(number);
  if (!key) return -1;
  PyObject *stream = PyDict_GetItemWithError(table, key);
  Py_XINCREF(stream);
  Py_DECREF(key);
  if (!stream && PyErr_Occurred()) return -1;
  int taken = 0;
  if (stream) {
    PyObject *track = PyObject_GetAttr(stream, names.track);
    taken = !track ? -1 : Py_TYPE(track) == track_type ? take_token((Track *)track, stream, touched, index, token) : 0;
    Py_XDECREF(track);
    Py_DECREF(stream);
  }
  if (taken) return taken < 0 ? -1 : 0;
  PyObject *entry = Py_BuildValue("(III)", number, index, token);
  int failed = !entry || PyList_Append(rest, entry);
  Py_XDECREF(entry);
  return failed ? -1 : 0;
}

static unsigned int u32_at(const char *column, Py_ssize_t entry) {
  unsigned int value;
  memcpy(&value, column + 4 * entry, 4);
  return value;
}

static PyObject *take(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *touched, *table, *rest;
  const char *streams, *indices, *tokens;
  Py_ssize_t size, indices_size, tokens_size;
  if (!PyArg_ParseTuple(args, "O!O!y#y#y#", &PyList_Type, &touched, &PyDict_Type, &table, &streams, &size, &indices,
                        &indices_size, &tokens, &tokens_size))
    return NULL;
  if (size % 4 || size != indices_size || size != tokens_size)
    return PyErr_SetString(PyExc_ValueError, "the columns are no u32 of the same number"), NULL;
  if (!(rest = PyList_New(0))) return NULL;
  for (Py_ssize_t i = 0; i < size / 4; i++)
    if (take_entry(table, touched, rest, u32_at(streams, i), u32_at(indices, i), u32_at(tokens, i))) {
      Py_DECREF(rest);
      return NULL;
    }
  return rest;
}

/* ---- deliver ---- */

typedef struct {
  Track *track;
  size_t at, size;
} piece;

typedef struct {
  char *bytes;
  size_t used, room;
  piece *pieces;
  size_t count;
} batch;

static char *batch_room(batch *out, size_t size) {
  if (out->used + size > out->room) {
    size_t room = 2 * (out->used + size);
    char *bytes = PyMem_Realloc(out->bytes, room);
    if (!bytes) return PyErr_NoMemory(), NULL;
    out->bytes = bytes, out->room = room;
  }
  return out->bytes + out->used;
}

static char *put(char *to, PyObject *bytes) {
  Py_ssize_t size = PyBytes_Size(bytes);
  memcpy(to, PyBytes_AsString(bytes), (size_t)size);
  return to + size;
}

/* The table's fragment of a token, borrowed; NULL: the detokenizer has to look closer. */
static PyObject *fragment_of(Track *track, PyObject *token) {
  unsigned long id = PyLong_AsUnsignedLong(token);
  if (PyErr_Occurred() || id >= (unsigned long)PyList_Size(track->fragments)) return PyErr_Clear(), NULL;
  PyObject *fragment = PyList_GetItem(track->fragments, (Py_ssize_t)id);
  return fragment && PyBytes_CheckExact(fragment) ? fragment : NULL;
}

/* Write the tokens' event as a chunk into the batch: 1; 0: they are not plain. */
static int frame(Track *track, PyObject *tokens, batch *out) {
  Py_ssize_t count = PyList_Size(tokens);
  size_t text = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *fragment = fragment_of(track, PyList_GetItem(tokens, i));
    if (!fragment) return 0;
    text += (size_t)PyBytes_Size(fragment);
  }
  if (!text) return 0;
  size_t size = text + (size_t)PyBytes_Size(track->prefix) + (size_t)PyBytes_Size(track->suffix);
  char *to = batch_room(out, size + 24), *from = to;
  if (!to) return -1;
  to += snprintf(to, 20, "%zx\r\n", size);
  to = put(to, track->prefix);
  for (Py_ssize_t i = 0; i < count; i++) to = put(to, fragment_of(track, PyList_GetItem(tokens, i)));
  to = put(to, track->suffix);
  *to++ = '\r', *to++ = '\n';
  out->pieces[out->count] = (piece){track, out->used, (size_t)(to - from)};
  return 1;
}

/* Whether the transport has nothing to send. */
static int is_empty(Track *track, PyObject *direct) {
  if (direct == track->empty_since) return 1;
  PyObject *waiting = PyObject_CallNoArgs(track->waiting);
  if (!waiting) return -1;
  Py_ssize_t bytes = PyLong_AsSsize_t(waiting);
  Py_DECREF(waiting);
  if (bytes == -1 && PyErr_Occurred()) return -1;
  if (bytes) return 0;
  PyObject *before = track->empty_since;
  track->empty_since = Py_NewRef(direct);
  Py_XDECREF(before);
  return 1;
}

/* Whether nothing stands between the tokens and the socket. */
static int is_clear(Track *track) {
  PyObject *generation = track->generation;
  int found;
  if ((found = is_same(generation, names.attempt, track->attempt)) != 1) return found;
  if ((found = is_same(generation, names.closing, Py_False)) != 1) return found;
  if ((found = is_same(track->table, names.open, Py_False)) != 1) return found;
  PyObject *direct = PyObject_GetAttr(track->reply, names.direct);
  if (!direct) return -1;
  found = direct == Py_None ? 0 : is_empty(track, direct);
  Py_DECREF(direct);
  return found;
}

/* The books of the tokens that `frame` has written: as `Generation.deliver` keeps them. */
static int book(Track *track, PyObject *tokens, PyObject *tick, PyObject *nothing) {
  PyObject *generation = track->generation;
  Py_ssize_t size = PyList_Size(tokens);
  if (fresh_room(track, (size_t)size)) return -1;
  PyObject *count = PyObject_GetAttr(generation, names.count);
  int failed = !count || PyObject_SetAttr(generation, names.pending, nothing) || PyList_Append(track->ticks, tick) ||
               PyObject_SetAttr(generation, names.delivered, count) || PyObject_SetAttr(track->reply, names.idle_ticks, names.zero);
  Py_XDECREF(count);
  if (!failed && size > 1) {
    PyObject *done = PyObject_CallFunction(track->burst, "n", size);
    failed = !done;
    Py_XDECREF(done);
  }
  if (failed) return -1;
  for (Py_ssize_t i = 0; i < size; i++)
    track->fresh[track->fresh_count++] = (unsigned int)PyLong_AsUnsignedLong(PyList_GetItem(tokens, i));
  return 0;
}

/* 1: in the batch; 0: there was nothing, or `slow` has it. */
static int deliver_track(Track *track, PyObject *tick, PyObject *nothing, batch *out, PyObject *slow) {
  PyObject *tokens = PyObject_GetAttr(track->generation, names.pending);
  if (!tokens) return -1;
  int plain = PyList_CheckExact(tokens);
  if (plain && !PyList_Size(tokens)) return Py_DECREF(tokens), 0;
  if (plain) plain = is_clear(track);
  if (plain == 1) plain = frame(track, tokens, out);
  if (plain == 1 && book(track, tokens, tick, nothing)) plain = -1;
  Py_DECREF(tokens);
  if (plain == 1) {
    out->used += out->pieces[out->count++].size;
    return 1;
  }
  return plain < 0 || PyList_Append(slow, track->generation) ? -1 : 0;
}

static int send_all(const batch *out, PyObject *unwritten) {
  for (size_t i = 0; i < out->count; i++) {
    const piece *one = out->pieces + i;
    ssize_t sent = send(one->track->fd, out->bytes + one->at, one->size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent == (ssize_t)one->size) continue;
    size_t gone = sent > 0 ? (size_t)sent : 0;
    Py_CLEAR(one->track->empty_since);
    PyObject *entry = Py_BuildValue("(Oy#)", one->track->write, out->bytes + one->at + gone, (Py_ssize_t)(one->size - gone));
    int failed = !entry || PyList_Append(unwritten, entry);
    Py_XDECREF(entry);
    if (failed) return -1;
  }
  return 0;
}

static PyObject *deliver(PyObject *module, PyObject *args) {
  (void)module;
  PyObject *touched, *tick, *nothing;
  if (!PyArg_ParseTuple(args, "O!OO!", &PyList_Type, &touched, &tick, &PyList_Type, &nothing)) return NULL;
  Py_ssize_t count = PyList_Size(touched);
  PyObject *tracks = PyList_GetSlice(touched, 0, count), *slow = PyList_New(0), *torn = PyList_New(0), *unwritten = PyList_New(0);
  PyObject *result = NULL;
  batch out = {PyMem_Malloc(16384), 0, 16384, PyMem_Malloc((size_t)(count + 1) * sizeof(piece)), 0};
  if (!out.bytes || !out.pieces) PyErr_NoMemory();
  else if (tracks && slow && torn && unwritten && !PyList_SetSlice(touched, 0, count, NULL)) {
    for (Py_ssize_t i = 0; i < count; i++) {
      Track *track = (Track *)PyList_GetItem(tracks, i);
      if (Py_TYPE((PyObject *)track) != track_type || deliver_track(track, tick, nothing, &out, slow) >= 0) continue;
      PyErr_WriteUnraisable((PyObject *)track); /* a fault of one stream must never reach another */
      if (PyList_Append(torn, track->generation)) PyErr_Clear();
    }
    if (!send_all(&out, unwritten)) result = Py_BuildValue("(OOO)", slow, torn, unwritten);
  }
  PyMem_Free(out.bytes);
  PyMem_Free(out.pieces);
  Py_XDECREF(tracks);
  Py_XDECREF(slow);
  Py_XDECREF(torn);
  Py_XDECREF(unwritten);
  return result;
}

/* ---- the module ---- */

static PyMemberDef track_members[] = {
    {"attempt", T_OBJECT, offsetof(Track, attempt), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};
static PyMethodDef track_methods[] = {{"ride", track_ride, METH_O, NULL}, {"fresh", track_fresh, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
static PyType_Slot track_slots[] = {
    {Py_tp_new, track_new},         {Py_tp_dealloc, track_dealloc}, {Py_tp_traverse, track_visit},
    {Py_tp_clear, track_clear},     {Py_tp_members, track_members}, {Py_tp_methods, track_methods}, {0, NULL},
};
static PyType_Spec track_spec = {"holdfast.requests._express.Track", sizeof(Track), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                                track_slots};
static PyMethodDef functions[] = {{"take", take, METH_VARARGS, NULL}, {"deliver", deliver, METH_VARARGS, NULL}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_express", "The short way of plain tokens, compiled.", -1, functions, NULL, NULL, NULL, NULL};

static int intern_names(void) {
  names.attempt = PyUnicode_InternFromString("attempt"), names.closing = PyUnicode_InternFromString("closing");
  names.count = PyUnicode_InternFromString("count"), names.delivered = PyUnicode_InternFromString("delivered");
  names.direct = PyUnicode_InternFromString("direct"), names.expected = PyUnicode_InternFromString("expected");
  names.idle_ticks = PyUnicode_InternFromString("idle_ticks");
  names.track = PyUnicode_InternFromString("track"), names.open = PyUnicode_InternFromString("open");
  names.pending = PyUnicode_InternFromString("pending"), names.zero = PyLong_FromLong(0);
  return PyErr_Occurred() ? -1 : 0;
}

PyMODINIT_FUNC PyInit__express(void) {
  PyObject *module = PyModule_Create(&module_def), *type = PyType_FromSpec(&track_spec);
  if (!module || !type || intern_names() || PyModule_AddObjectRef(module, "Track", type) ||
      PyModule_AddIntConstant(module, "VERSION", VERSION) || PyModule_AddStringConstant(module, "SOURCE_DIGEST", SOURCE_DIGEST)) {
    Py_XDECREF(type);
    Py_CLEAR(module);
    return module;
  }
  track_type = (PyTypeObject *)type;
  return module;
}
