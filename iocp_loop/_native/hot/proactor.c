/* What a transport asks of its proactor once in its life: to receive from a socket, and to let go of that (proactor.py). */

#include "hot.h"

typedef struct {
    PyObject_HEAD
    PyObject *receive_natively, *drop_natively; /* of the driver, or None */
    PyObject *kept, *lines;                     /* dicts: what is kept for somebody to come, and who stands in line */
} Requests;

static void requests_dealloc(Requests *self);

/* Whether something is kept for somebody to come, or somebody stands in line; -1 with an exception. */
static int is_claimed(const Requests *self)
{
    if (self->kept != NULL && self->lines != NULL && PyDict_Check(self->kept) && PyDict_Check(self->lines))
        return PyDict_GET_SIZE(self->kept) > 0 || PyDict_GET_SIZE(self->lines) > 0;
    PyErr_SetString(PyExc_TypeError, "_kept and _lines of a proactor must be dicts");
    return -1;
}

/* receive_stream(sock, deliver, get_buffer=None) */
static PyObject *requests_receive_stream(Requests *self, PyObject *const *args, Py_ssize_t count)
{
    const struct hot *hot = hot_of(Py_TYPE(self), (destructor)requests_dealloc);
    if (hot == NULL)
        return NULL;
    if (count < 2 || count > 3 || self->receive_natively == NULL) {
        PyErr_SetString(PyExc_TypeError, "receive_stream() takes a socket and one or two callables");
        return NULL;
    }
    if (is_claimed(self) < 0)
        return NULL;
    PyObject *given[] = {(PyObject *)self, args[0], args[1], count == 3 ? args[2] : Py_None}, *op = NULL, *done;
    if (self->receive_natively != Py_None) {
        op = PyObject_Vectorcall(self->receive_natively, given + 1, 3, NULL);
        if (op == NULL)
            return NULL;
    }
    if (op == NULL || op == Py_None)
        Py_XSETREF(op, PyObject_VectorcallMethod(hot->names.receive_otherwise, given, 4, NULL));
    int claimed = op == NULL ? 0 : is_claimed(self); /* as it is now: making the operation may have called anything */
    if (claimed < 0)
        Py_CLEAR(op);
    if (claimed > 0) {
        done = PyObject_CallMethodOneArg((PyObject *)self, hot->names.deliver_unclaimed, op);
        if (done == NULL)
            Py_CLEAR(op);
        Py_XDECREF(done);
    }
    return op;
}

static PyObject *requests_drop(Requests *self, PyObject *op)
{
    if (self->drop_natively == NULL || self->drop_natively == Py_None)
        Py_RETURN_FALSE;
    return PyObject_CallOneArg(self->drop_natively, op);
}

#define OWNED(DO) DO(self->receive_natively); DO(self->drop_natively); DO(self->kept); DO(self->lines)

static int requests_traverse(Requests *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    OWNED(Py_VISIT);
    return 0;
}

static int requests_clear(Requests *self)
{
    OWNED(Py_CLEAR);
    return 0;
}

static void requests_dealloc(Requests *self)
{
    PyObject_GC_UnTrack(self);
    requests_clear(self);
    free_object((PyObject *)self);
}

static PyMethodDef requests_methods[] = {
    {"receive_stream", (PyCFunction)(void (*)(void))requests_receive_stream, METH_FASTCALL,
     "receive_stream($self, sock, deliver, get_buffer=None, /)\n--\n\n"
     "Receive until the end: ``deliver(data, None)``; see :class:`~iocp_loop.operations.ReceiveStream`."},
    {"drop", (PyCFunction)requests_drop, METH_O,
     "End a stream at once, of whose end nobody needs to be told; False if it has to be cancelled."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef requests_members[] = {
    {"_receive_natively", T_OBJECT_EX, offsetof(Requests, receive_natively), 0, NULL},
    {"_drop_natively", T_OBJECT_EX, offsetof(Requests, drop_natively), 0, NULL},
    {"_kept", T_OBJECT_EX, offsetof(Requests, kept), 0, NULL},
    {"_lines", T_OBJECT_EX, offsetof(Requests, lines), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot requests_slots[] = {
    {Py_tp_doc, (char *)"What a transport asks of its proactor."},
    {Py_tp_dealloc, requests_dealloc},
    {Py_tp_traverse, requests_traverse},
    {Py_tp_clear, requests_clear},
    {Py_tp_methods, requests_methods},
    {Py_tp_members, requests_members},
    {0, NULL},
};

static PyType_Spec requests_spec = {
    .name = "iocp_loop._hot.Requests",
    .basicsize = sizeof(Requests),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = requests_slots,
};

int add_requests(struct hot *hot)
{
    PyTypeObject *type = add_type(hot, &requests_spec, NULL);
    Py_XDECREF(type); /* the module has it */
    return type == NULL ? -1 : 0;
}
