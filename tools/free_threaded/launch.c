/*
 * Makes an ordinary interpreter of a program that has CPython linked into it: loaded ahead of it (LD_PRELOAD), this takes
 * the place of its main, and does what python does with a command line.
 *
 * That CPython has no Py_Main, as the linker leaves out what the program does not use.  So PyConfig reads the command line,
 * and the few lines of Python below run what it says.
 */
#define _GNU_SOURCE
#include <Python.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

/* run(command, module, filename), of which one is a string or none is. */
static const char run[] =
    "def run(command, module, filename):\n"
    "    import __main__, io, os, runpy, sys\n"
    "    scope = __main__.__dict__\n"
    "    del scope['run']\n"
    "    if command is not None:\n"
    "        if not sys.flags.safe_path: sys.path.insert(0, '')\n"
    "        code = compile(command, '<string>', 'exec')\n"
    "    elif module is not None:\n"
    "        if not sys.flags.safe_path: sys.path.insert(0, os.getcwd())\n"
    "        return runpy._run_module_as_main(module)\n"
    "    elif filename is None:\n"
    "        code = compile(sys.stdin.read(), '<stdin>', 'exec')\n"
    "    elif os.path.isdir(filename):\n"
    "        return runpy.run_path(filename, run_name='__main__')\n"
    "    else:\n"
    "        if not sys.flags.safe_path: sys.path.insert(0, os.path.dirname(os.path.realpath(filename)))\n"
    "        scope['__file__'] = filename\n"
    "        with io.open_code(os.path.abspath(filename)) as file: code = compile(file.read(), filename, 'exec')\n"
    "    exec(code, scope)\n";

static void must(PyStatus status)
{
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
}

static int python(int argc, char **argv, char **environment)
{
    PyPreConfig before;
    PyConfig config;
    char *name = getenv("LAUNCH_AS"), *home = getenv("LAUNCH_HOME");
    PyPreConfig_InitPythonConfig(&before);
    before.utf8_mode = 1;
    must(Py_PreInitializeFromBytesArgs(&before, argc, argv));
    PyConfig_InitPythonConfig(&config);
    must(PyConfig_SetBytesString(&config, &config.program_name, name));
    must(PyConfig_SetBytesString(&config, &config.executable, name));
    if (home != NULL) /* in a virtual environment pyvenv.cfg says it */
        must(PyConfig_SetBytesString(&config, &config.home, home));
    unsetenv("LD_PRELOAD"); /* children begin as we did */
    unsetenv("LAUNCH_AS");
    unsetenv("LAUNCH_HOME");
    must(PyConfig_SetBytesArgv(&config, argc, argv));
    must(PyConfig_Read(&config));
    must(Py_InitializeFromConfig(&config));
    PyObject *scope = PyModule_GetDict(PyImport_AddModule("__main__"));
    PyObject *defined = PyRun_String(run, Py_file_input, scope, scope), *result = NULL;
    if (defined != NULL)
        result = PyObject_CallFunction(PyDict_GetItemString(scope, "run"), "uuu", config.run_command, config.run_module,
                                       config.run_filename);
    Py_XDECREF(defined);
    PyConfig_Clear(&config);
    int interrupted = result == NULL && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt), failed = result == NULL;
    if (result == NULL)
        PyErr_Print(); /* which exits for a SystemExit */
    Py_XDECREF(result);
    if (Py_FinalizeEx() < 0 && !failed)
        return 120;
    if (interrupted) { /* the caller is to see what has ended us */
        signal(SIGINT, SIG_DFL);
        kill(getpid(), SIGINT);
    }
    return failed;
}

typedef int (*main_function)(int, char **, char **);
typedef int (*start_function)(main_function, int, char **, void (*)(void), void (*)(void), void (*)(void), void *);

int __libc_start_main(main_function program, int argc, char **argv, void (*init)(void), void (*fini)(void),
                      void (*rtld_fini)(void), void *stack_end)
{
    start_function start = (start_function)dlsym(RTLD_NEXT, "__libc_start_main");
    return start(getenv("LAUNCH_AS") ? python : program, argc, argv, init, fini, rtld_fini, stack_end);
}
