/* The module iocp_loop._hot: puts the files together.  hot.h tells what is where. */

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
#ifdef HAS_ACCEPT
    {"accept", accept_connection, METH_O, "accept(listener): (connection, address); None if the listener is not a plain one."},
#endif
#ifdef _WIN32
    {"adopt", adopt_connection, METH_VARARGS, "adopt(listener, descriptor): its socket; None if the listener is not plain."},
#endif
    {"tls_types", make_tls_types, METH_VARARGS, "tls_types(wrapped, flushing, again, sslobject_class, wrapped_class)"},
    {"stream_type", make_stream_type, METH_O, "The native base of a stream transport, above a class with flow control."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "iocp_loop._hot",
    .m_doc = "The native tier of iocp_loop; see iocp_loop/native.py.",
    .m_size = 0, /* not -1: a second interpreter is to ask PyInit__hot, too */
    .m_methods = module_methods,
};

PyMODINIT_FUNC PyInit__hot(void)
{
    static PyObject *first; /* what it keeps is static: one for the process */
    if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
        PyErr_SetString(PyExc_ImportError, "the native tier works in the main interpreter only");
        return NULL;
    }
    if (first != NULL)
        return Py_NewRef(first);
    PyObject *module = PyModule_Create(&module_definition);
    if (module == NULL)
        return NULL;
    if (intern_names() < 0 || check_sockets() < 0 || find_asyncio_methods() < 0 || add_handles(module) < 0 || add_turns(module) < 0
        || add_driver(module) < 0
        || add_sockets(module) < 0 || add_datagrams(module) < 0
#ifdef __linux__
        || add_epoll(module) < 0 || add_uring(module) < 0
#endif
#ifdef _WIN32
        || add_iocp(module) < 0
#endif
    ) {
        Py_DECREF(module);
        return NULL;
    }
#if defined(Py_GIL_DISABLED) && !defined(_WIN32) /* where iocp.c was not tried without */
    PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED); /* hot.h tells how */
#endif
    first = Py_NewRef(module);
    return module;
}
