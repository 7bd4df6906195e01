// SPDX-License-Identifier: MIT OR GPL-2.0
/*
 * In the place of the driver's main module, below nvidia-uvm: no GPU ever comes, and every request is answered as
 * not supported, except for what a nvidia-uvm without GPUs needs to load and unload. `cargo xtask vm-test` lists in
 * rm_missing.h what the nvidia-uvm that it built asks for.
 */
#include <linux/module.h>
#include <linux/types.h>

#define NOT_SUPPORTED 0x56

#define MISSING(name) u32 name(void); u32 name(void) { return NOT_SUPPORTED; } EXPORT_SYMBOL(name)
#include "rm_missing.h"

u32 nvUvmInterfaceSessionCreate(void **session, u8 platform[2]);
u32 nvUvmInterfaceSessionDestroy(void *session);
u32 nvUvmInterfaceRegisterUvmCallbacks(void *callbacks);
void nvUvmInterfaceDeRegisterUvmOps(void);

/* Neither address translation by the CPU's tables nor confidential computing. */
u32 nvUvmInterfaceSessionCreate(void **session, u8 platform[2])
{
	*session = session;
	platform[0] = platform[1] = 0;
	return 0;
}
EXPORT_SYMBOL(nvUvmInterfaceSessionCreate);

u32 nvUvmInterfaceSessionDestroy(void *session)
{
	return 0;
}
EXPORT_SYMBOL(nvUvmInterfaceSessionDestroy);

u32 nvUvmInterfaceRegisterUvmCallbacks(void *callbacks)
{
	return 0;
}
EXPORT_SYMBOL(nvUvmInterfaceRegisterUvmCallbacks);

void nvUvmInterfaceDeRegisterUvmOps(void)
{
}
EXPORT_SYMBOL(nvUvmInterfaceDeRegisterUvmOps);

MODULE_DESCRIPTION("A driver without GPUs below nvidia-uvm, for the tests of nvshare");
MODULE_LICENSE("Dual MIT/GPL");
