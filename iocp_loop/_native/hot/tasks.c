/* Futures and tasks: what is asked for with every request of a server. */

#include "turns.h"

static PyObject *futures, *tasks;                   /* the modules, whose Future and Task may be replaced too */
static PyObject *future_name, *task_name;           /* "Future" and "Task" */
static PyObject *loop_keyword, *loop_name_keywords; /* ("loop",) and ("loop", "name") */

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
    PyObject *args[] = {(PyObject *)self};
    return call_type(futures, future_name, args, 0, loop_keyword);
}

/* BaseEventLoop's way for all that is not plain: a task factory, debug mode, keywords that a later Python brings; or what
 * somebody has put in its place. */
static PyObject *create_task_slowly(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    Py_ssize_t all = count + (kwnames == NULL ? 0 : PyTuple_GET_SIZE(kwnames));
    PyObject **more = PyMem_New(PyObject *, all + 1), *method, *task;
    if (more == NULL)
        return PyErr_NoMemory();
    more[0] = (PyObject *)self;
    for (Py_ssize_t n = 0; n < all; n++)
        more[n + 1] = args[n];
    method = PyObject_GetAttr((PyObject *)create_task_method.type, create_task_method.name);
    task = method == NULL ? NULL : PyObject_Vectorcall(method, more, (size_t)count + 1, kwnames);
    Py_XDECREF(method);
    PyMem_Free(more);
    return task;
}

PyObject *turns_create_task(Turns *self, PyObject *const *args, Py_ssize_t count, PyObject *kwnames)
{
    if (self->head.debug || self->closed || (self->task_factory != NULL && self->task_factory != Py_None) || count != 1
        || is_replaced(&create_task_method))
        return create_task_slowly(self, args, count, kwnames);
    if (kwnames == NULL) {
        PyObject *plain[] = {args[0], (PyObject *)self};
        return call_type(tasks, task_name, plain, 1, loop_keyword);
    }
    /* asyncio.create_task always brings a name. */
    if (PyTuple_GET_SIZE(kwnames) == 1 && PyTuple_GET_ITEM(kwnames, 0) == PyTuple_GET_ITEM(loop_name_keywords, 1)) {
        PyObject *named[] = {args[0], (PyObject *)self, args[1]};
        return call_type(tasks, task_name, named, 1, loop_name_keywords);
    }
    return create_task_slowly(self, args, count, kwnames);
}

char create_task_doc[400];

/* Write the signature of BaseEventLoop.create_task, which has changed over the versions, where inspect looks for ours. */
static int describe_create_task(void)
{
    static const char start[] = "(self", text[] = "\n--\n\nRun a coroutine as a Task of this loop.";
    PyObject *function = attribute_of("inspect", "signature");
    PyObject *method = PyObject_GetAttr((PyObject *)create_task_method.type, create_task_method.name);
    PyObject *signature = method == NULL || function == NULL ? NULL : PyObject_CallOneArg(function, method);
    PyObject *written = signature == NULL ? NULL : PyObject_Str(signature);
    const char *parameters = written == NULL ? NULL : PyUnicode_AsUTF8(written);
    if (parameters != NULL && strncmp(parameters, start, sizeof start - 1) == 0)
        snprintf(create_task_doc, sizeof create_task_doc, "create_task($self%s%s", parameters + sizeof start - 1, text);
    Py_XDECREF(method);
    Py_XDECREF(function);
    Py_XDECREF(signature);
    Py_XDECREF(written);
    return parameters == NULL ? -1 : 0;
}

int add_tasks(void)
{
    futures = PyImport_ImportModule("asyncio.futures");
    tasks = PyImport_ImportModule("asyncio.tasks");
    future_name = PyUnicode_InternFromString("Future");
    task_name = PyUnicode_InternFromString("Task");
    PyObject *loop = PyUnicode_InternFromString("loop"), *name = PyUnicode_InternFromString("name");
    loop_keyword = Py_BuildValue("(O)", loop);
    loop_name_keywords = Py_BuildValue("(NN)", loop, name);
    if (futures == NULL || tasks == NULL || future_name == NULL || task_name == NULL || loop_keyword == NULL
        || loop_name_keywords == NULL || describe_create_task() < 0)
        return -1;
    return 0;
}
