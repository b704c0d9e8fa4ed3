/*
 * Included ahead of everything else (-include) where the native part is built for ThreadSanitizer.
 *
 * The interpreter itself is not built for it: what its own locks and counts of references put in order, ThreadSanitizer does
 * not see, and every object that changes hands would be a race.  So this tells it:
 *
 *   - a critical section of an object acquires and releases the address of the object;
 *   - whoever drops a reference that is not the last, in another thread than the owner's, releases; whoever frees acquires;
 *   - whoever makes a reference has put the object in order for whom it goes to: releases;
 *   - memory that Python's allocator hands out begins anew, whoever had it before.
 *
 * The locks of the module threading are told of in sitecustomize.py.
 */
#ifndef IOCP_LOOP_TSAN_H
#define IOCP_LOOP_TSAN_H

#define PY_SSIZE_T_CLEAN
#define _Py_DecRefShared tsan_drop_reference
#include <Python.h>
#undef _Py_DecRefShared
#include <sanitizer/tsan_interface.h>

extern void tsan_python_drops_reference(PyObject *) __asm__("_Py_DecRefShared");

__attribute__((weak)) void tsan_drop_reference(PyObject *object)
{
    __tsan_release(object);
    tsan_python_drops_reference(object);
}

#define PyObject_GC_UnTrack(object) (__tsan_acquire(object), PyObject_GC_UnTrack(object))

#undef Py_NewRef
#define Py_NewRef(object) (__tsan_release(object), _Py_NewRef((PyObject *)(object)))

#undef Py_BEGIN_CRITICAL_SECTION
#define Py_BEGIN_CRITICAL_SECTION(object)                           \
    {                                                               \
        void *tsan_guarded = (object);                              \
        PyCriticalSection tsan_section;                             \
        PyCriticalSection_Begin(&tsan_section, tsan_guarded);       \
        __tsan_acquire(tsan_guarded);
#undef Py_END_CRITICAL_SECTION
#define Py_END_CRITICAL_SECTION()                                   \
        __tsan_release(tsan_guarded);                               \
        PyCriticalSection_End(&tsan_section);                       \
    }

/* The interface for the memory of Java, which is what a garbage collector's heap needs: forget what was known of a range. */
void __tsan_java_init(unsigned long begin, unsigned long size);
void __tsan_java_alloc(unsigned long begin, unsigned long size);
void __tsan_java_free(unsigned long begin, unsigned long size);

__attribute__((weak)) PyMemAllocatorEx tsan_allocators[2];

static void *tsan_begins_anew(void *memory, size_t size)
{
    size = (size + 7) & ~(size_t)7;
    if (memory != NULL && size > 0) {
        __tsan_java_free((unsigned long)memory, size);
        __tsan_java_alloc((unsigned long)memory, size);
    }
    return memory;
}

static void *tsan_malloc(void *context, size_t size)
{
    PyMemAllocatorEx *python = context;
    return tsan_begins_anew(python->malloc(python->ctx, size), size);
}

static void *tsan_calloc(void *context, size_t count, size_t size)
{
    PyMemAllocatorEx *python = context;
    return tsan_begins_anew(python->calloc(python->ctx, count, size), count * size);
}

static void *tsan_realloc(void *context, void *memory, size_t size)
{
    PyMemAllocatorEx *python = context;
    void *moved = python->realloc(python->ctx, memory, size);
    return moved == memory ? moved : tsan_begins_anew(moved, size);
}

static void tsan_free(void *context, void *memory)
{
    PyMemAllocatorEx *python = context;
    python->free(python->ctx, memory);
}

__attribute__((constructor)) static void tsan_begin(void)
{
    static const PyMemAllocatorDomain domains[] = {PYMEM_DOMAIN_MEM, PYMEM_DOMAIN_OBJ};
    if (tsan_allocators[0].malloc != NULL)
        return;
    __tsan_java_init(8, 1UL << 47);
    for (int n = 0; n < 2; n++) {
        PyMem_GetAllocator(domains[n], &tsan_allocators[n]);
        PyMem_SetAllocator(domains[n], &(PyMemAllocatorEx){&tsan_allocators[n], tsan_malloc, tsan_calloc, tsan_realloc, tsan_free});
    }
}

#endif
