/* The module iocp_loop._hot: puts the files together.  hot.h tells what is where. */

#include "accepting.h"
#include "connecting.h"
#include "epoll.h"
#include "iocp.h"
#include "sockets.h"
#include "turns.h"

static PyMethodDef module_methods[] = {
    {"set_helpers", set_helpers, METH_VARARGS, "set_helpers(report_error, run_in_debug)"},
    {"use_operations", use_operations, METH_O, "Look up the slots of the classes of iocp_loop.operations."},
    {"socket_calls", make_socket_calls, METH_VARARGS,
     "socket_calls(loop, proactor, driver, unclaimed, lines, transports)"},
    {"receive_datagrams", receive_datagrams, METH_VARARGS, "receive_datagrams(driver, op, most)"},
    {"receive_datagram", (PyCFunction)(void (*)(void))receive_datagram_now, METH_FASTCALL, "receive_datagram(sock, size)"},
    {"send_datagram", (PyCFunction)(void (*)(void))send_datagram, METH_FASTCALL,
     "send_datagram(sock, family, data, address)"},
#ifdef __linux__
    {"connect", (PyCFunction)(void (*)(void))connect_now, METH_FASTCALL,
     "connect(sock, address): True if it is connected, False if that has begun, or the error; None if they are not plain."},
#endif
#ifdef HAS_ACCEPT
    {"accept", accept_connection, METH_O, "accept(listener): (connection, address); None if the listener is not a plain one."},
#endif
#ifdef _WIN32
    {"adopt", adopt_connection, METH_VARARGS, "adopt(listener, descriptor): its socket; None if the listener is not plain."},
#endif
    {"tls_types", make_tls_types, METH_VARARGS, "tls_types(wrapped, flushing, again, sslobject_class, wrapped_class)"},
    {"life_steps", life_steps, METH_NOARGS,
     "LIFE of life.py as the C has it: a list of (state, event, next state, method)."},
    {"stream_type", make_stream_type, METH_VARARGS,
     "stream_type(base, takes_bytes, context_for, send_without_delay, servers_count)"},
    {"set_most_at_once", set_most_at_once, METH_O, "set_most_at_once(size): what one call of send gets at most, bytes."},
    {"use_reader", use_reader, METH_O, "use_reader(class): the class in Python above Reader."},
    {NULL, NULL, 0, NULL},
};

static int fill_module(PyObject *module)
{
    struct hot *hot = hot_in(module);
    hot->module = module;
    if (intern_names(hot) < 0 || check_sockets(hot) < 0 || find_asyncio_methods(hot) < 0 || add_handles(hot) < 0
        || add_turns(hot) < 0 || add_driver(hot) < 0 || add_sockets(hot) < 0 || add_datagrams(hot) < 0
        || add_accepting(hot) < 0 || add_requests(hot) < 0 || add_readers(hot) < 0)
        return -1;
#ifdef __linux__
    if (add_epoll(hot) < 0 || add_uring(hot) < 0)
        return -1;
#endif
#ifdef _WIN32
    if (add_iocp(hot) < 0)
        return -1;
#endif
    return 0;
}

/* The owned references but those of the methods, which have a number among them. */
static PyObject **first_reference(struct hot *hot) { return (PyObject **)&hot->names; }

static int visit_method(struct asyncio_method *method, visitproc visit, void *arg)
{
    Py_VISIT(method->type);
    Py_VISIT(method->name);
    Py_VISIT(method->globals);
    return 0;
}

static void clear_method(struct asyncio_method *method)
{
    Py_CLEAR(method->type);
    Py_CLEAR(method->name);
    Py_CLEAR(method->globals);
}

static int traverse_module(PyObject *module, visitproc visit, void *arg)
{
    struct hot *hot = hot_in(module);
    for (PyObject **place = first_reference(hot); place < &hot->last; place++)
        Py_VISIT(*place);
    int stop = visit_method(&hot->handle_run_method, visit, arg);
    return stop ? stop : visit_method(&hot->create_task_method, visit, arg);
}

/* Not before: hot.h tells why there is no m_clear. */
static void free_module(void *module)
{
    struct hot *hot = hot_in(module);
    free_spare_handles(hot);
    for (PyObject **place = first_reference(hot); place < &hot->last; place++)
        Py_CLEAR(*place);
    clear_method(&hot->handle_run_method);
    clear_method(&hot->create_task_method);
    free(hot->scratch);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, fill_module},
#ifdef Py_MOD_PER_INTERPRETER_GIL_SUPPORTED
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if defined(Py_GIL_DISABLED) && !defined(_WIN32) /* where iocp.c was not tried without */
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* hot.h tells how */
#endif
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "iocp_loop._hot",
    .m_doc = "The native tier of iocp_loop; see iocp_loop/native.py.",
    .m_size = sizeof(struct hot),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = traverse_module,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__hot(void) { return PyModuleDef_Init(&module_definition); }
