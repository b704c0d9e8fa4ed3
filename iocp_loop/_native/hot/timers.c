/*
 * The timers of a loop: a heap by time, and by the order of their making where times are equal.
 *
 * A timer knows its place in the heap (handles.h, timer_place), so that a cancelled one leaves at once: a busy server sets many
 * timeouts, and few ever fire.
 */

#include "handles.h"

/* So many stand beneath each in the heap.  It takes half the steps that it takes with two, and each step writes to a timer,
 * which may be out of the caches. */
enum { CHILDREN = 4 };

static int earlier(const struct timer *one, const struct timer *other)
{
    return one->when < other->when || (one->when == other->when && one->serial < other->serial);
}

/* Where `handle` keeps its place. */
static size_t *place_of(const struct timers *self, PyObject *handle)
{
    return (size_t *)((char *)handle + self->place_offset);
}

static void put(struct timers *self, size_t place, struct timer timer)
{
    self->heap[place] = timer;
    *place_of(self, timer.handle) = place;
}

static void move_up(struct timers *self, size_t place, struct timer timer)
{
    while (place > 0) {
        size_t parent = (place - 1) / CHILDREN;
        if (!earlier(&timer, &self->heap[parent]))
            break;
        put(self, place, self->heap[parent]);
        place = parent;
    }
    put(self, place, timer);
}

static void move_down(struct timers *self, size_t place, struct timer timer)
{
    for (;;) {
        size_t child = CHILDREN * place + 1, end = child + CHILDREN < self->count ? child + CHILDREN : self->count;
        if (child >= self->count)
            break;
        for (size_t other = child + 1; other < end; other++)
            if (earlier(&self->heap[other], &self->heap[child]))
                child = other;
        if (!earlier(&self->heap[child], &timer))
            break;
        put(self, place, self->heap[child]);
        place = child;
    }
    put(self, place, timer);
}

PyObject *timers_take(struct timers *self, size_t place)
{
    PyObject *handle = self->heap[place].handle;
    struct timer last = self->heap[--self->count];
    *place_of(self, handle) = NOWHERE;
    if (place < self->count) {
        if (place > 0 && earlier(&last, &self->heap[(place - 1) / CHILDREN]))
            move_up(self, place, last);
        else
            move_down(self, place, last);
    }
    return handle;
}

int timers_add(struct timers *self, PyObject *handle, double when)
{
    if (self->count == self->room) {
        size_t room = self->room ? 2 * self->room : 64;
        struct timer *heap = self->heap;
        PyMem_Resize(heap, struct timer, room);
        if (heap == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        self->heap = heap;
        self->room = room;
    }
    struct timer timer = {when, self->serial++, Py_NewRef(handle)};
    move_up(self, self->count++, timer);
    return 0;
}

static int compare(const void *one, const void *other)
{
    return earlier(one, other) ? -1 : earlier(other, one);
}

PyObject *timers_list(PyObject *loop, const struct timers *self)
{
    /* Of a copy: what the collector runs when the list is made may change the heap. */
    size_t count;
    struct timer *copy;
    Py_BEGIN_CRITICAL_SECTION(loop);
    count = self->count;
    copy = PyMem_New(struct timer, count);
    for (size_t n = 0; copy != NULL && n < count; n++) {
        copy[n] = self->heap[n];
        Py_INCREF(copy[n].handle);
    }
    Py_END_CRITICAL_SECTION();
    if (copy == NULL)
        return PyErr_NoMemory();
    qsort(copy, count, sizeof *copy, compare);
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t n = 0; n < count; n++)
        if (list != NULL)
            PyList_SET_ITEM(list, (Py_ssize_t)n, copy[n].handle);
        else
            Py_DECREF(copy[n].handle);
    PyMem_Free(copy);
    return list;
}

/* Two of those right beneath the first are enough to know. */
int timers_crowded(const struct timers *self, double end)
{
    int due = 0;
    for (size_t n = 1; n <= CHILDREN && n < self->count; n++)
        due += self->heap[n].when < end;
    return due >= 2;
}
