/*
 * The ready queue of a loop: a ring of handles.  One of them stands for the completions that the wait of this turn has
 * gathered (methods/turns.py has its class): what was ready before them is to run before them.
 */

#include "turns.h"

static int grow(Turns *self)
{
    size_t room = self->room ? 2 * self->room : 64;
    PyObject **ring = PyMem_New(PyObject *, room);
    if (ring == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t n = 0; n < self->count; n++)
        ring[n] = self->ring[(self->first + n) & (self->room - 1)];
    PyMem_Free(self->ring);
    self->ring = ring;
    self->room = room;
    self->first = 0;
    return 0;
}

/* Takes over the reference to `handle`, also when it fails. */
int ready_push(Turns *self, PyObject *handle)
{
    int failed;
    Py_BEGIN_CRITICAL_SECTION(self);
    failed = self->count == self->room && grow(self) < 0;
    if (!failed) {
        self->ring[(self->first + self->count) & (self->room - 1)] = handle;
        WRITE(self->count, self->count + 1);
    }
    Py_END_CRITICAL_SECTION();
    if (failed)
        Py_DECREF(handle);
    return failed ? -1 : 0;
}

/* NULL if nothing is ready. */
PyObject *ready_pop(Turns *self)
{
    PyObject *handle = NULL;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (self->count > 0) {
        handle = self->ring[self->first];
        self->first = (self->first + 1) & (self->room - 1);
        WRITE(self->count, self->count - 1);
    }
    Py_END_CRITICAL_SECTION();
    return handle;
}

/* ---------------------------------------------------------------------------------------------------------------------
 * The ready queue as Python sees it: loop._ready, for BaseEventLoop's own methods and for the curious
 * ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
    PyObject_HEAD
    Turns *loop;
} Queue;

static Py_ssize_t queue_length(Queue *self) { return (Py_ssize_t)self->loop->count; }

/* A timer that somebody puts here, because it is due, is none any more. */
static PyObject *queue_append(Queue *self, PyObject *handle)
{
    struct loop_head *head = &self->loop->head;
    if (Py_IS_TYPE(handle, head->hot->TimerHandle_type))
        timer_leave(head, handle);
    handle_track(head->hot, handle);
    if (ready_push(self->loop, Py_NewRef(handle)) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *queue_popleft(Queue *self, PyObject *ignored)
{
    PyObject *handle = ready_pop(self->loop);
    if (handle == NULL) {
        PyErr_SetString(PyExc_IndexError, "nothing is ready");
        return NULL;
    }
    handle_release(self->loop->head.hot, Py_NewRef(handle));
    return handle;
}

static PyObject *queue_clear(Queue *self, PyObject *ignored)
{
    PyObject *handle;
    while ((handle = ready_pop(self->loop)) != NULL)
        handle_release(self->loop->head.hot, handle);
    Py_RETURN_NONE;
}

static PyObject *queue_item(Queue *self, Py_ssize_t index)
{
    Turns *loop = self->loop;
    PyObject *handle = NULL;
    Py_BEGIN_CRITICAL_SECTION(loop);
    if (index >= 0 && (size_t)index < loop->count)
        handle = Py_NewRef(loop->ring[(loop->first + (size_t)index) & (loop->room - 1)]);
    Py_END_CRITICAL_SECTION();
    if (handle == NULL)
        PyErr_SetString(PyExc_IndexError, "nothing is ready there");
    return handle;
}

static PyObject *queue_iterate(Queue *self)
{
    PyObject *list = PyList_New(0), *iterator, *handle;
    for (Py_ssize_t n = 0; list != NULL && (handle = queue_item(self, n)) != NULL; n++) {
        if (PyList_Append(list, handle) < 0)
            Py_CLEAR(list);
        Py_DECREF(handle);
    }
    if (list != NULL)
        PyErr_Clear(); /* an IndexError: these were all */
    if (list == NULL)
        return NULL;
    iterator = PyObject_GetIter(list);
    Py_DECREF(list);
    return iterator;
}

static int queue_traverse(Queue *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(self->loop);
    return 0;
}

static void queue_dealloc(Queue *self)
{
    PyObject_GC_UnTrack(self);
    Py_DECREF(self->loop);
    free_object((PyObject *)self);
}

static PyMethodDef queue_methods[] = {
    {"append", (PyCFunction)queue_append, METH_O, NULL},
    {"popleft", (PyCFunction)queue_popleft, METH_NOARGS, NULL},
    {"clear", (PyCFunction)queue_clear, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot queue_slots[] = {
    {Py_tp_dealloc, queue_dealloc},
    {Py_tp_traverse, queue_traverse}, /* and no clear: whoever refers to this has one, the loop first */
    {Py_tp_methods, queue_methods},
    {Py_tp_iter, queue_iterate},
    {Py_sq_length, queue_length},
    {Py_sq_item, queue_item},
    {0, NULL},
};

static PyType_Spec queue_spec = {
    .name = "iocp_loop._hot.ReadyQueue",
    .basicsize = sizeof(Queue),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = queue_slots,
};

PyObject *ready_get(Turns *self, void *ignored)
{
    Queue *queue = PyObject_GC_New(Queue, self->head.hot->Queue_type);
    if (queue == NULL)
        return NULL;
    queue->loop = (Turns *)Py_NewRef(self);
    PyObject_GC_Track(queue);
    return (PyObject *)queue;
}

int add_ready(struct hot *hot)
{
    hot->Queue_type = (PyTypeObject *)PyType_FromModuleAndSpec(hot->module, &queue_spec, NULL);
    return hot->Queue_type == NULL ? -1 : 0;
}
