/* The turn of driver iocp, on Windows (iocp.c). */
#ifndef IOCP_LOOP_HOT_IOCP_H
#define IOCP_LOOP_HOT_IOCP_H

#include "driver.h"

#ifdef _WIN32
int add_iocp(PyObject *module);
#endif

#endif
