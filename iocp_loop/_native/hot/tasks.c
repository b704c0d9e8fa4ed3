/* Futures and tasks: what is asked for with every request of a server. */

#include "turns.h"

static PyObject *call_type(PyObject *module, PyObject *name, PyObject *const *args, size_t count, PyObject *kwnames)
{
    PyObject *type = Py_XNewRef(PyDict_GetItemWithError(PyModule_GetDict(module), name)), *made;
    if (type == NULL && !PyErr_Occurred())
        PyErr_SetObject(PyExc_AttributeError, name);
    made = type == NULL ? NULL : PyObject_Vectorcall(type, args, count, kwnames);
    Py_XDECREF(type);
    return made;
}

PyObject *turns_create_future(Turns *self, PyObject *ignored)
{
    const struct hot *hot = self->head.hot;
    PyObject *args[] = {(PyObject *)self};
    return call_type(hot->tasks.futures, hot->tasks.future, args, 0, hot->tasks.of_loop);
}

/* BaseEventLoop's way for all that is not plain: a task factory, debug mode, keywords that a later Python brings; or what
 * somebody has put in its place. */
static PyObject *create_task_slowly(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    const struct hot *hot = self->head.hot;
    Py_ssize_t all = count + (kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames));
    PyObject **more = PyMem_New(PyObject *, all + 1), *method, *task;
    if (more == NULL)
        return PyErr_NoMemory();
    more[0] = (PyObject *)self;
    for (Py_ssize_t n = 0; n < all; n++)
        more[n + 1] = args[n];
    method = PyObject_GetAttr((PyObject *)hot->create_task_method.type, hot->create_task_method.name);
    task = method == NULL ? NULL : PyObject_Vectorcall(method, more, (size_t)count + 1, kwnames);
    Py_XDECREF(method);
    PyMem_Free(more);
    return task;
}

PyObject *turns_create_task(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    struct hot *hot = self->head.hot;
    if (self->head.debug || self->closed || (self->task_factory != NULL && self->task_factory != Py_None) || count != 1
        || is_replaced(&hot->create_task_method))
        return create_task_slowly(self, args, count, kwnames);
    if (kwnames == NULL) {
        PyObject *plain[] = {args[0], (PyObject *)self};
        return call_type(hot->tasks.tasks, hot->tasks.task, plain, 1, hot->tasks.of_loop);
    }
    /* asyncio.create_task always brings a name. */
    if (PyTuple_GET_SIZE(kwnames) == 1 && PyTuple_GET_ITEM(kwnames, 0) == PyTuple_GET_ITEM(hot->tasks.of_loop_by_name, 1)) {
        PyObject *named[] = {args[0], (PyObject *)self, args[1]};
        return call_type(hot->tasks.tasks, hot->tasks.task, named, 1, hot->tasks.of_loop_by_name);
    }
    return create_task_slowly(self, args, count, kwnames);
}

/* Write the signature of BaseEventLoop.create_task, which has changed over the versions, where inspect looks for ours. */
static int describe_create_task(struct hot *hot)
{
    static const char start[] = "(self", text[] = "\n--\n\nRun a coroutine as a Task of this loop.";
    PyObject *function = attribute_of("inspect", "signature");
    PyObject *method = PyObject_GetAttr((PyObject *)hot->create_task_method.type, hot->create_task_method.name);
    PyObject *signature = method == NULL || function == NULL ? NULL : PyObject_CallOneArg(function, method);
    PyObject *written = signature == NULL ? NULL : PyObject_Str(signature);
    const char *parameters = written == NULL ? NULL : PyUnicode_AsUTF8(written);
    if (parameters != NULL && strncmp(parameters, start, sizeof start - 1) == 0)
        snprintf(hot->create_task_doc, sizeof hot->create_task_doc, "create_task($self%s%s",
                 parameters + sizeof start - 1, text);
    Py_XDECREF(method);
    Py_XDECREF(function);
    Py_XDECREF(signature);
    Py_XDECREF(written);
    return parameters == NULL ? -1 : 0;
}

/* Put create_task, whose docstring is made here, into the type of loops. */
static int add_create_task(struct hot *hot)
{
    if (describe_create_task(hot) < 0)
        return -1;
    hot->create_task = (PyMethodDef){"create_task", (PyCFunction)(void (*)(void))turns_create_task,
                                     METH_FASTCALL | METH_KEYWORDS, hot->create_task_doc};
    PyObject *method = PyDescr_NewMethod(hot->Turns_type, &hot->create_task);
    int failed = method == NULL ? -1 : PyObject_SetAttrString((PyObject *)hot->Turns_type, "create_task", method);
    Py_XDECREF(method);
    return failed;
}

int add_tasks(struct hot *hot)
{
    hot->tasks.futures = PyImport_ImportModule("asyncio.futures");
    hot->tasks.tasks = PyImport_ImportModule("asyncio.tasks");
    hot->tasks.future = PyUnicode_InternFromString("Future");
    hot->tasks.task = PyUnicode_InternFromString("Task");
    PyObject *loop = PyUnicode_InternFromString("loop"), *name = PyUnicode_InternFromString("name");
    hot->tasks.of_loop = Py_BuildValue("(O)", loop);
    hot->tasks.of_loop_by_name = Py_BuildValue("(NN)", loop, name);
    return PyErr_Occurred() ? -1 : add_create_task(hot);
}
