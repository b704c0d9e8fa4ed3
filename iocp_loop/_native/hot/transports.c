/* The type of a stream transport: what there is in it, and what Python and the garbage collector see of that. */

#include "streams.h"

static PyObject *get_sock(PyObject *self, void *ignored)
{
    PyObject *sock = take_reference(self, &stream_of(self)->sock);
    if (sock == NULL)
        PyErr_SetString(PyExc_AttributeError, "_sock");
    return sock;
}

static int set_sock(PyObject *self, PyObject *value, void *ignored)
{
    const struct hot *hot = hot_of_stream(self);
    struct stream *stream = stream_of(self);
    if (hot == NULL)
        return -1;
    stream->by_call = value != NULL && is_socket(hot, value);
    put_reference(self, &stream->sock, Py_XNewRef(value));
    return 0;
}

static PyObject *get_state(PyObject *self, void *ignored)
{
    int state = stream_of(self)->state;
    if (state != UNMADE)
        return PyLong_FromLong(state);
    PyErr_SetString(PyExc_AttributeError, "_state");
    return NULL;
}

static int stream_clear(PyObject *self)
{
    struct stream *stream = stream_of(self);
    stream->direct = stream->by_call = 0;
    for (size_t n = 0; n < STREAM_OBJECTS; n++)
        Py_CLEAR(stream->objects[n]);
    Py_CLEAR(stream->sockname);
    clear_slots(self, stream_type_of(self)->tp_base);
    return 0;
}

static int stream_traverse(PyObject *self, visitproc visit, void *arg)
{
    struct stream *stream = stream_of(self);
    Py_VISIT(Py_TYPE(self));
    for (size_t n = 0; n < STREAM_OBJECTS; n++)
        Py_VISIT(stream->objects[n]);
    return visit_slots(self, stream_type_of(self)->tp_base, visit, arg);
}

void stream_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    stream_clear(self);
    free_object(self);
}

static PyObject *stream_is_closing(PyObject *self, PyObject *ignored)
{
    return PyBool_FromLong(stream_of(self)->state >= CLOSING);
}

static PyMethodDef stream_methods[] = {
    {"is_closing", stream_is_closing, METH_NOARGS,
     "is_closing($self)\n--\n\nTrue once ``close`` or ``abort`` was called, or the connection was lost."},
    {"write", stream_write, METH_O,
     "write($self, data)\n--\n\n"
               "Send `data` (bytes, bytearray or memoryview) without blocking; the rest is queued."},
    {"_received", (PyCFunction)(void (*)(void))stream_received, METH_FASTCALL,
     "A completion for a Protocol: data, the end (empty), or an error."},
    {"_received_into", (PyCFunction)(void (*)(void))stream_received_into, METH_FASTCALL,
     "A completion for a BufferedProtocol: so many bytes are in its buffer already, or here they are."},
    {"_get_buffer_of_protocol", (PyCFunction)(void (*)(void))stream_get_buffer, METH_FASTCALL,
     "A buffer to receive into; None if there must be none now, or the protocol failed to give one."},
    {"_begin", stream_begin, METH_O, "Tell the protocol of the connection, and receive."},
    {"_arm_receive", stream_arm_receive, METH_NOARGS, "Begin to receive."},
    {"set_protocol", stream_set_protocol, METH_O,
     "set_protocol($self, protocol)\n--\n\nSwitch protocols; the next data go to the new one."},
    {"_receive_ended", stream_receive_ended, METH_O, "The last completion: the end of the stream, or an error."},
    {"close", stream_close, METH_NOARGS,
     "close($self)\n--\n\nSend what is queued, then close; ``connection_lost(None)`` follows."},
    {"_stop_receiving", stream_stop_receiving, METH_NOARGS, "Nothing that comes is for the protocol any more."},
    {"_lose_connection", stream_lose_connection, METH_O, "``connection_lost`` follows."},
    {"_call_connection_lost", stream_call_connection_lost, METH_O, "Tell the protocol, and let go of everything."},
    {"_release", stream_release, METH_NOARGS,
     "Close the socket when the protocol is done with it and the kernel too."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef stream_getset[] = {
    {"_sock", get_sock, set_sock, NULL, NULL},
    {"_state", get_state, NULL, "How far its life has come, see life.py.", NULL},
    {"_peername", stream_peername, NULL, NULL, NULL},
    {"_sockname", stream_sockname, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define FIELD(name, type, field) {name, type, (Py_ssize_t)offsetof(struct stream, field), 0, NULL}
static const PyMemberDef stream_members[] = {
    FIELD("_protocol", T_OBJECT_EX, protocol),
    FIELD("_context", T_OBJECT_EX, context),
    FIELD("_proactor", T_OBJECT_EX, proactor),
    FIELD("_server", T_OBJECT_EX, server),
    FIELD("_receive", T_OBJECT_EX, receive),
    FIELD("_sending", T_OBJECT_EX, sending),
    FIELD("_file", T_OBJECT_EX, file),
    FIELD("_queue", T_OBJECT_EX, queue),
    FIELD("_held", T_OBJECT_EX, held),
    FIELD("_info", T_OBJECT_EX, info),
    FIELD("_queued", T_PYSSIZET, queued),
    FIELD("_writes_after_loss", T_INT, writes_after_loss),
    FIELD("_direct", T_BOOL, direct),
    FIELD("_paused", T_BOOL, paused),
    FIELD("_eof_asked", T_BOOL, eof_asked),
    FIELD("_at_eof", T_BOOL, at_eof),
    FIELD("_buffered", T_BOOL, buffered),
    {NULL, 0, 0, 0, NULL},
};

/* The slots of flow control, and the limits that asyncio gives a transport to begin with. */
static int find_flow_control(struct hot *hot, PyObject *base)
{
    hot->flow.loop = slot_offset(base, "_loop");
    hot->flow.protocol_paused = slot_offset(base, "_protocol_paused");
    hot->flow.high_water = slot_offset(base, "_high_water");
    hot->flow.low_water = slot_offset(base, "_low_water");
    PyObject *flow = PyErr_Occurred() ? NULL : PyType_GenericAlloc((PyTypeObject *)base, 0);
    if (flow == NULL || done_with(PyObject_CallMethod(flow, "_init_flow_control", NULL)) < 0) {
        Py_XDECREF(flow);
        return -1;
    }
    Py_XSETREF(hot->life.high, Py_XNewRef(SLOT(flow, hot->flow.high_water)));
    Py_XSETREF(hot->life.low, Py_XNewRef(SLOT(flow, hot->flow.low_water)));
    Py_DECREF(flow);
    return hot->life.high == NULL || hot->life.low == NULL ? -1 : 0;
}

static int find_others(struct hot *hot)
{
    Py_XSETREF(hot->life.protocol, attribute_of("asyncio", "Protocol"));
    Py_XSETREF(hot->life.buffered_protocol, attribute_of("asyncio", "BufferedProtocol"));
    Py_XSETREF(hot->life.keyed_ref, attribute_of("weakref", "KeyedRef"));
    Py_XSETREF(hot->life.of_context, PyTuple_Pack(1, hot->names.context));
    if (PyErr_Occurred())
        return -1;
    hot->flow.key = slot_offset(hot->life.keyed_ref, "key");
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *make_type(PyObject *module, PyObject *base)
{
    Py_ssize_t offset = ((PyTypeObject *)base)->tp_basicsize;
    PyMemberDef members[sizeof stream_members / sizeof *stream_members];
    memcpy(members, stream_members, sizeof members);
    for (PyMemberDef *member = members; member->name != NULL; member++)
        member->offset += offset;
    PyType_Slot slots[] = {
        {Py_tp_init, stream_init},
        {Py_tp_finalize, stream_finalize},
        {Py_tp_dealloc, stream_dealloc},
        {Py_tp_traverse, stream_traverse},
        {Py_tp_clear, stream_clear},
        {Py_tp_methods, stream_methods},
        {Py_tp_members, members},
        {Py_tp_getset, stream_getset},
        {Py_tp_doc, (char *)"A stream transport's life, and its way of one message in and out."},
        {0, NULL},
    };
    PyType_Spec spec = {
        .name = "iocp_loop._hot.Stream",
        .basicsize = (int)(offset + (Py_ssize_t)sizeof(struct stream)),
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
        .slots = slots,
    };
    PyObject *bases = PyTuple_Pack(1, base);
    PyObject *type = bases == NULL ? NULL : PyType_FromModuleAndSpec(module, &spec, bases);
    Py_XDECREF(bases);
    return type;
}

PyObject *make_stream_type(PyObject *module, PyObject *args)
{
    struct hot *hot = hot_in(module);
    PyObject *base, *takes_bytes, *context_for, *send_without_delay; /* borrowed */
    int servers_count;
    if (!PyArg_ParseTuple(args, "OOOOp", &base, &takes_bytes, &context_for, &send_without_delay, &servers_count))
        return NULL;
    if (hot->Stream_type != NULL)
        return Py_NewRef(hot->Stream_type);
    if (!PyType_Check(base) || !PyType_IS_GC((PyTypeObject *)base) || ((PyTypeObject *)base)->tp_weaklistoffset) {
        PyErr_SetString(PyExc_TypeError, "the base must be a class with nothing but slots");
        return NULL;
    }
    if (check_slots((PyTypeObject *)base) < 0 || find_flow_control(hot, base) < 0 || find_others(hot) < 0)
        return NULL;
    Py_XSETREF(hot->life.takes_bytes, Py_NewRef(takes_bytes));
    Py_XSETREF(hot->life.context_for, Py_NewRef(context_for));
    Py_XSETREF(hot->life.send_without_delay, Py_NewRef(send_without_delay));
    hot->servers_count = servers_count;
    hot->stream_offset = ((PyTypeObject *)base)->tp_basicsize;
    hot->Stream_type = (PyTypeObject *)make_type(module, base);
    return Py_XNewRef((PyObject *)hot->Stream_type);
}
