/*
 * The way of one message through TLS: what comes from the peer is decrypted and given to the protocol, what the protocol
 * writes is encrypted and given to the transport beneath.  Handshake, shutdown, errors and flow control are left to
 * asyncio's SSLProtocol, which the class in Python inherits from besides (iocp_loop/endpoints/tls.py).
 *
 * The two share one state.  What this file looks at has its place in `struct tls`, under the names that SSLProtocol
 * uses: as a member of the type comes before an entry of the instance's __dict__, "self._state = ..." over there sets
 * `state` here.
 *
 * Encrypting and decrypting are the work of ssl.SSLObject over two ssl.MemoryBIO; there is no other way to OpenSSL from
 * here.  What is saved is around it:
 *
 *   - A read that finds nothing raises SSLWantReadError, and making that costs more than decrypting a small record.  So
 *     none is made when it is known that there is nothing: OpenSSL takes one record at a time out of `incoming` unless
 *     it is told to read ahead, which the ssl module does not do.  If a read did not fill its memory, then nothing of
 *     the record is left; and if `incoming` is empty too, then nothing is left at all.
 *   - The records of one piece of data are decrypted into one bytes object, as large as what they are made of.
 *   - The transport beneath hands over bytes (data_received); no connection keeps a buffer for them.
 *
 * Ownership: as in hot.h.  Whatever is called may do anything, to this object too: protocols, an SSLObject of the user's
 * own class, callbacks of an SSLContext, finalizers.  So each call is made with references of its own, the state is looked
 * at anew afterwards, and any member may be missing then.  Raw memory is lent to nobody but OpenSSL's own object.
 */

#include "hot.h"

struct tls {
    PyObject_HEAD
    struct hot *hot;
    PyObject *state, *sslobj, *incoming, *outgoing, *transport, *app_protocol, *app_get_buffer, *app_buffer_updated,
        *write_backlog;
    PyObject *read, *write; /* methods of `sslobj`, or of what it wraps; NULL until they are needed */
    Py_ssize_t write_buffer_size, incoming_high_water, incoming_low_water, outgoing_high_water;
    char direct; /* they are those of OpenSSL's own object, which keeps nothing of what it is given */
    char app_protocol_is_buffer, app_reading_paused, app_writing_paused, ssl_reading_paused, ssl_writing_paused;
};

/* The plain text of a record, at most (RFC 8446, 5.1). */
enum { RECORD = 1 << 14 };

/* ---------------------------------------------------------------------------------------------------------------------
 * OpenSSL, by way of the ssl module
 * ------------------------------------------------------------------------------------------------------------------ */

/* The object in `member`; NULL with an AttributeError if it was deleted. */
static PyObject *get(struct tls *self, PyObject **member, const char *name)
{
    PyObject *object = take_reference((PyObject *)self, member);
    if (object == NULL)
        PyErr_SetString(PyExc_AttributeError, name);
    return object;
}

/* Find `read` and `write`.  A plain SSLObject only passes its calls on, to an object in C. */
static int find_methods(struct tls *self)
{
    PyObject *object = get(self, &self->sslobj, "_sslobj"), *beneath = NULL;
    if (object == NULL)
        return -1;
    if (Py_IS_TYPE(object, (PyTypeObject *)self->hot->tls.sslobject_class)) {
        beneath = PyObject_GetAttrString(object, "_sslobj");
        if (beneath == NULL)
            PyErr_Clear();
    }
    int direct = beneath != NULL && Py_IS_TYPE(beneath, (PyTypeObject *)self->hot->tls.wrapped_class);
    if (direct)
        Py_SETREF(object, Py_NewRef(beneath));
    Py_XDECREF(beneath);
    PyObject *read = PyObject_GetAttrString(object, "read");
    PyObject *write = read == NULL ? NULL : PyObject_GetAttrString(object, "write");
    Py_DECREF(object);
    if (write == NULL) {
        Py_XDECREF(read);
        return -1;
    }
    self->direct = direct && PyCFunction_Check(read);
    put_reference((PyObject *)self, &self->read, read);
    put_reference((PyObject *)self, &self->write, write);
    return 0;
}

/* How many bytes there are in the MemoryBIO that is `member`; -1 with an exception. */
static Py_ssize_t pending_in(struct tls *self, PyObject **member, const char *name)
{
    PyObject *bio = get(self, member, name), *pending = bio == NULL ? NULL : PyObject_GetAttr(bio, self->hot->names.pending);
    Py_ssize_t size = pending == NULL ? -1 : PyLong_AsSsize_t(pending);
    Py_XDECREF(pending);
    Py_XDECREF(bio);
    if (size < 0 && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%s has a negative number of bytes", name);
    return size;
}

enum { NOT_NOW = -2 };

/* The count, at most `most`, that a call of read or write has returned; NOT_NOW; or -1 with an exception. */
static Py_ssize_t count_of(const struct hot *hot, PyObject *result, Py_ssize_t most)
{
    if (result == NULL) {
        if (!PyErr_ExceptionMatches(hot->tls.again))
            return -1;
        PyErr_Clear();
        return NOT_NOW;
    }
    Py_ssize_t count = PyLong_AsSsize_t(result);
    Py_DECREF(result);
    if (count > most || (count < 0 && !PyErr_Occurred())) {
        PyErr_Format(PyExc_ValueError, "an SSLObject has taken %zd of %zd bytes", count, most);
        return -1;
    }
    return count;
}

/* self.read(size, view), for at most `size` bytes of one record.  The count, which is 0 if the peer has ended the
 * connection; NOT_NOW; or -1 with an exception. */
static Py_ssize_t read_into(struct tls *self, PyObject *view, Py_ssize_t size)
{
    PyObject *args[] = {NULL, PyLong_FromSsize_t(size), view}, *read = get(self, &self->read, "read"), *result = NULL;
    if (args[1] != NULL && read != NULL)
        result = PyObject_Vectorcall(read, args + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
    Py_XDECREF(args[1]);
    Py_XDECREF(read);
    return count_of(self->hot, result, size);
}

/* Decrypt at most `size` bytes, of one record, into `memory`.  Returns what read_into does. */
static Py_ssize_t decrypt(struct tls *self, char *memory, Py_ssize_t size)
{
    Py_ssize_t count = -1;
    if (self->direct) {
        PyObject *view = PyMemoryView_FromMemory(memory, size, PyBUF_WRITE);
        if (view != NULL)
            count = read_into(self, view, size);
        Py_XDECREF(view);
        return count;
    }
    /* An SSLObject of the user's may keep what it is given, or views of it: they have memory of their own. */
    PyObject *lent = PyByteArray_FromStringAndSize(NULL, size);
    PyObject *view = lent == NULL ? NULL : PyMemoryView_FromObject(lent);
    if (view != NULL)
        count = read_into(self, view, size);
    if (count > 0 && count > PyByteArray_GET_SIZE(lent)) { /* they may have given it another size too */
        PyErr_SetString(PyExc_BufferError, "an SSLObject has shrunk the buffer that it was given");
        count = -1;
    } else if (count > 0)
        memcpy(memory, PyByteArray_AS_STRING(lent), (size_t)count);
    Py_XDECREF(view);
    Py_XDECREF(lent);
    return count;
}

/* Whether there may be data for the protocol. */
static int is_open(const struct tls *self)
{
    return self->state == self->hot->tls.wrapped || self->state == self->hot->tls.flushing;
}

enum filled { FAILED = -1, DRY, FULL, ENDED };

/* Decrypt what there is into `memory`; `*count` tells how much that was, also if it ended with an error. */
static enum filled fill(struct tls *self, char *memory, Py_ssize_t size, Py_ssize_t *count)
{
    *count = 0;
    while (*count < size) {
        Py_ssize_t more = decrypt(self, memory + *count, size - *count);
        if (more <= 0)
            return more == 0 ? ENDED : more == NOT_NOW ? DRY : FAILED;
        *count += more;
        if (*count == size)
            break;
        Py_ssize_t pending = pending_in(self, &self->incoming, "_incoming");
        if (pending <= 0)
            return pending == 0 ? DRY : FAILED;
    }
    return FULL;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * From the peer to the protocol
 * ------------------------------------------------------------------------------------------------------------------ */

/* `filled`, and what went wrong after the data, which have been delivered by now.  Takes `error` over; NULL: nothing. */
static enum filled with_error(enum filled filled, PyObject *error)
{
    if (error != NULL) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return filled;
}

/* One piece of data for a Protocol. */
static enum filled read_for_protocol(struct tls *self)
{
    Py_ssize_t size = pending_in(self, &self->incoming, "_incoming"), count;
    if (size < 0)
        return FAILED;
    /* A record of which OpenSSL has the beginning already may be larger than what is left of it here. */
    size = size < PY_SSIZE_T_MAX - RECORD ? size + RECORD : PY_SSIZE_T_MAX;
    PyObject *data = PyBytes_FromStringAndSize(NULL, size);
    if (data == NULL)
        return FAILED;
    enum filled filled = fill(self, PyBytes_AS_STRING(data), size, &count);
    if (count == 0) {
        Py_DECREF(data);
        return filled;
    }
    PyObject *error = filled == FAILED ? take_exception() : NULL; /* it comes after the data */
    PyObject *protocol = get(self, &self->app_protocol, "_app_protocol"), *result = NULL;
    if (protocol != NULL && _PyBytes_Resize(&data, count) == 0)
        result = PyObject_CallMethodOneArg(protocol, self->hot->names.data_received, data);
    Py_XDECREF(protocol);
    Py_XDECREF(data);
    if (result == NULL) {
        Py_XDECREF(error);
        return FAILED;
    }
    Py_DECREF(result);
    return with_error(filled, error);
}

/* The same for a BufferedProtocol, into what it provides. */
static enum filled read_for_buffered_protocol(struct tls *self)
{
    Py_ssize_t size = pending_in(self, &self->incoming, "_incoming"), count;
    PyObject *hint = size < 0 ? NULL : PyLong_FromSsize_t(size), *buffer = NULL;
    PyObject *get_buffer = hint == NULL ? NULL : get(self, &self->app_get_buffer, "_app_protocol_get_buffer");
    PyObject *protocol = take_reference((PyObject *)self, &self->app_protocol);
    if (get_buffer != NULL)
        buffer = PyObject_CallOneArg(get_buffer, hint);
    int wanted = self->app_protocol == protocol && is_open(self);
    Py_XDECREF(protocol);
    Py_XDECREF(get_buffer);
    Py_XDECREF(hint);
    if (buffer == NULL)
        return FAILED;
    if (!wanted) { /* it has been replaced, or has closed: look again who wants what there is */
        Py_DECREF(buffer);
        return FULL;
    }
    Py_buffer view;
    int lent = PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE);
    Py_DECREF(buffer); /* the view keeps it */
    if (lent < 0)
        return FAILED;
    if (view.len == 0) {
        PyBuffer_Release(&view);
        PyErr_SetString(PyExc_RuntimeError, "get_buffer() returned an empty buffer");
        return FAILED;
    }
    enum filled filled = fill(self, view.buf, view.len, &count);
    PyObject *error = filled == FAILED ? take_exception() : NULL;
    PyBuffer_Release(&view); /* before the protocol is called, which may give its buffer another size */
    if (count > 0) {
        PyObject *buffer_updated = get(self, &self->app_buffer_updated, "_app_protocol_buffer_updated");
        PyObject *number = buffer_updated == NULL ? NULL : PyLong_FromSsize_t(count);
        PyObject *result = number == NULL ? NULL : PyObject_CallOneArg(buffer_updated, number);
        Py_XDECREF(buffer_updated);
        Py_XDECREF(number);
        if (result == NULL) {
            Py_XDECREF(error);
            return FAILED;
        }
        Py_DECREF(result);
    }
    return with_error(filled, error);
}

static int call(struct tls *self, PyObject *method)
{
    PyObject *done = PyObject_CallMethodNoArgs((PyObject *)self, method);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int process_outgoing(struct tls *self);

/* Give the protocol what has come, until there is no more or it pauses; then see to what that has led to. */
static int read_all(struct tls *self)
{
    const struct names *names = &self->hot->names;
    if (!self->app_reading_paused) {
        enum filled filled;
        do {
            filled = self->app_protocol_is_buffer ? read_for_buffered_protocol(self) : read_for_protocol(self);
        } while (filled == FULL && !self->app_reading_paused && is_open(self));
        if (filled == FAILED
            || (filled == ENDED && (call(self, names->call_eof_received) < 0 || call(self, names->start_shutdown) < 0))
            || (has_items(self->write_backlog) ? call(self, names->do_write) : process_outgoing(self)) < 0)
            return -1;
    }
    Py_ssize_t pending = pending_in(self, &self->incoming, "_incoming");
    if (pending < 0)
        return -1;
    if (self->ssl_reading_paused ? pending <= self->incoming_low_water : pending >= self->incoming_high_water)
        return call(self, names->control_ssl_reading);
    return 0;
}

/* self._fatal_error(exception, message) for an ordinary exception; any other goes on. */
static int fail_connection(struct tls *self)
{
    return PyErr_ExceptionMatches(PyExc_Exception) ? fail((PyObject *)self, "_fatal_error", "Fatal error on SSL protocol")
                                                   : -1;
}

static PyObject *tls_do_read(PyObject *object, PyObject *unused)
{
    struct tls *self = (struct tls *)object;
    if (!is_open(self))
        Py_RETURN_NONE;
    if (self->read == NULL && find_methods(self) < 0)
        return NULL;
    if (read_all(self) < 0 && fail_connection(self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *tls_data_received(PyObject *object, PyObject *data)
{
    struct tls *self = (struct tls *)object;
    PyObject *incoming = get(self, &self->incoming, "_incoming");
    PyObject *written = incoming == NULL ? NULL : PyObject_CallMethodOneArg(incoming, self->hot->names.write, data);
    Py_XDECREF(incoming);
    if (written == NULL)
        return NULL;
    Py_DECREF(written);
    return self->state == self->hot->tls.wrapped ? tls_do_read(object, NULL)
                                                 : PyObject_CallMethodNoArgs(object, self->hot->names.go_on);
}

/* ---------------------------------------------------------------------------------------------------------------------
 * From the protocol to the peer
 * ------------------------------------------------------------------------------------------------------------------ */

/* Hand what has been encrypted to the transport, and let the protocol know if that is too much for it. */
static int process_outgoing(struct tls *self)
{
    Py_ssize_t pending = pending_in(self, &self->outgoing, "_outgoing");
    if (pending > 0 && !self->ssl_writing_paused) {
        PyObject *outgoing = get(self, &self->outgoing, "_outgoing"), *written = NULL;
        PyObject *data = outgoing == NULL ? NULL : PyObject_CallMethodNoArgs(outgoing, self->hot->names.read);
        PyObject *transport = data == NULL ? NULL : get(self, &self->transport, "_transport");
        if (transport != NULL)
            written = PyObject_CallMethodOneArg(transport, self->hot->names.write, data);
        Py_XDECREF(transport);
        Py_XDECREF(data);
        Py_XDECREF(outgoing);
        Py_XDECREF(written);
        if (written == NULL)
            return -1;
        pending = self->app_writing_paused ? 0 : pending_in(self, &self->outgoing, "_outgoing");
    }
    if (pending < 0)
        return -1;
    if (self->app_writing_paused || pending + self->write_buffer_size >= self->outgoing_high_water)
        return call(self, self->hot->names.control_app_writing);
    return 0;
}

/* Encrypt and send `data`, with nothing waiting before it.  What OpenSSL does not take waits. */
static int write_now(struct tls *self, PyObject *data)
{
    PyObject *write = get(self, &self->write, "write"), *taken = write == NULL ? NULL : PyObject_CallOneArg(write, data);
    Py_ssize_t size = PyBytes_GET_SIZE(data), count = count_of(self->hot, taken, size);
    Py_XDECREF(write);
    if (count == -1)
        return -1;
    if (count < size) {
        PyObject *rest = count == NOT_NOW ? Py_NewRef(data) : PySequence_GetSlice(data, count, size), *done = NULL;
        PyObject *backlog = rest == NULL ? NULL : get(self, &self->write_backlog, "_write_backlog");
        if (backlog != NULL)
            done = PyObject_CallMethodOneArg(backlog, self->hot->names.append, rest);
        Py_XDECREF(backlog);
        Py_XDECREF(rest);
        Py_XDECREF(done);
        if (done == NULL)
            return -1;
        self->write_buffer_size += count == NOT_NOW ? size : size - count;
    }
    return process_outgoing(self);
}

static PyObject *transport_write(PyObject *transport, PyTypeObject *type, PyObject *const *args, size_t count,
                                 PyObject *kwnames)
{
    const struct hot *hot = PyType_GetModuleState(type);
    if (hot == NULL)
        return NULL;
    if (count != 1 || kwnames != NULL)
        return PyErr_Format(PyExc_TypeError, "write() takes data and nothing else");
    PyObject *data = args[0];
    PyObject *object = PyObject_GetAttr(transport, hot->names.ssl_protocol);
    if (object == NULL)
        return NULL;
    struct tls *self = (struct tls *)object;
    if (!PyObject_TypeCheck(object, hot->Tls_type) || !PyBytes_CheckExact(data) || PyBytes_GET_SIZE(data) == 0
        || self->state != hot->tls.wrapped || self->write_backlog == NULL || has_items(self->write_backlog)
        || self->outgoing == NULL || (self->write == NULL && find_methods(self) < 0)) {
        Py_DECREF(object);
        return PyErr_Occurred() ? NULL : PyObject_CallMethodOneArg(transport, hot->names.write_otherwise, data);
    }
    int failed = write_now(self, data) < 0 && fail_connection(self) < 0;
    Py_DECREF(object);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The types
 * ------------------------------------------------------------------------------------------------------------------ */

static void tls_dealloc(PyObject *object);

static PyObject *tls_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    struct hot *hot = hot_of(type, tls_dealloc);
    PyObject *self = hot == NULL ? NULL : PyType_GenericNew(type, args, kwargs);
    if (self != NULL) {
        ((struct tls *)self)->hot = hot;
        Py_INCREF(hot->module);
    }
    return self;
}

static int tls_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct tls *self = (struct tls *)object;
    for (PyObject **field = &self->state; field <= &self->write; field++)
        Py_VISIT(*field);
    Py_VISIT(Py_TYPE(object));
    return visit_hot(self->hot, visit, arg);
}

static int tls_clear(PyObject *object)
{
    struct tls *self = (struct tls *)object;
    for (PyObject **field = &self->state; field <= &self->write; field++)
        Py_CLEAR(*field);
    return 0;
}

static void tls_dealloc(PyObject *object)
{
    PyObject_GC_UnTrack(object);
    tls_clear(object);
    free_with_hot(object, ((struct tls *)object)->hot);
}

static PyMethodDef tls_methods[] = {
    {"data_received", tls_data_received, METH_O, "data_received($self, data, /)\n--\n\nSome bytes from the peer."},
    {"_do_read", tls_do_read, METH_NOARGS, "_do_read($self, /)\n--\n\nGive the protocol what has come."},
    {NULL, NULL, 0, NULL},
};

#define MEMBER(name, kind) {"_" #name, kind, offsetof(struct tls, name), 0, NULL}
static PyMemberDef tls_members[] = {
    MEMBER(state, T_OBJECT_EX),
    MEMBER(sslobj, T_OBJECT_EX),
    MEMBER(incoming, T_OBJECT_EX),
    MEMBER(outgoing, T_OBJECT_EX),
    MEMBER(transport, T_OBJECT_EX),
    MEMBER(app_protocol, T_OBJECT_EX),
    {"_app_protocol_get_buffer", T_OBJECT_EX, offsetof(struct tls, app_get_buffer), 0, NULL},
    {"_app_protocol_buffer_updated", T_OBJECT_EX, offsetof(struct tls, app_buffer_updated), 0, NULL},
    MEMBER(write_backlog, T_OBJECT_EX),
    MEMBER(write_buffer_size, T_PYSSIZET),
    MEMBER(incoming_high_water, T_PYSSIZET),
    MEMBER(incoming_low_water, T_PYSSIZET),
    MEMBER(outgoing_high_water, T_PYSSIZET),
    MEMBER(app_protocol_is_buffer, T_BOOL),
    MEMBER(app_reading_paused, T_BOOL),
    MEMBER(app_writing_paused, T_BOOL),
    MEMBER(ssl_reading_paused, T_BOOL),
    MEMBER(ssl_writing_paused, T_BOOL),
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot tls_slots[] = {
    {Py_tp_new, tls_new},
    {Py_tp_dealloc, tls_dealloc},
    {Py_tp_traverse, tls_traverse},
    {Py_tp_clear, tls_clear},
    {Py_tp_methods, tls_methods},
    {Py_tp_members, tls_members},
    {Py_tp_doc, (char *)"The way of one message through TLS."},
    {0, NULL},
};

static PyType_Spec tls_spec = {
    .name = "iocp_loop._hot.Tls",
    .basicsize = sizeof(struct tls),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = tls_slots,
};

static PyMethodDef transport_methods[] = {
    {"write", (PyCFunction)(void (*)(void))transport_write, METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
     "write($self, data, /)\n--\n\nEncrypt and send `data` without blocking."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot transport_slots[] = {
    {Py_tp_methods, transport_methods},
    {Py_tp_doc, (char *)"The way of one message out through TLS.  It has no fields, so that it fits beside any class."},
    {0, NULL},
};

static PyType_Spec transport_spec = {
    .name = "iocp_loop._hot.TlsTransport",
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = transport_slots,
};

/* tls_types(wrapped, flushing, again, sslobject_class, wrapped_class): the types Tls and TlsTransport. */
PyObject *make_tls_types(PyObject *module, PyObject *args)
{
    struct hot *hot = hot_in(module);
    PyObject *given[5];
    if (!PyArg_ParseTuple(args, "OOOOO", &given[0], &given[1], &given[2], &given[3], &given[4]))
        return NULL;
    Py_XSETREF(hot->tls.wrapped, Py_NewRef(given[0]));
    Py_XSETREF(hot->tls.flushing, Py_NewRef(given[1]));
    Py_XSETREF(hot->tls.again, Py_NewRef(given[2]));
    Py_XSETREF(hot->tls.sslobject_class, Py_NewRef(given[3]));
    Py_XSETREF(hot->tls.wrapped_class, Py_NewRef(given[4]));
    if (hot->Tls_type == NULL)
        hot->Tls_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &tls_spec, NULL);
    if (hot->Tls_type != NULL && hot->TlsTransport_type == NULL)
        hot->TlsTransport_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &transport_spec, NULL);
    if (hot->TlsTransport_type == NULL)
        return NULL;
    return PyTuple_Pack(2, hot->Tls_type, hot->TlsTransport_type);
}
