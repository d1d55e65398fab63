/* A name service that does not answer while the file of SLEEPY_NSS exists: nsswitch.conf(5), "passwd: files sleepy". */
#include <errno.h>
#include <grp.h>
#include <nss.h>
#include <pwd.h>
#include <stdlib.h>
#include <unistd.h>

static enum nss_status wait_then(enum nss_status status, int *error)
{
	const char *path = getenv("SLEEPY_NSS");

	while (path && access(path, F_OK) == 0)
		usleep(10000);
	*error = ENOENT;
	return status;
}

enum nss_status _nss_sleepy_getpwuid_r(uid_t uid, struct passwd *result, char *buffer, size_t size, int *error)
{
	return wait_then(NSS_STATUS_NOTFOUND, error);
}

enum nss_status _nss_sleepy_getpwnam_r(const char *name, struct passwd *result, char *buffer, size_t size, int *error)
{
	return wait_then(NSS_STATUS_NOTFOUND, error);
}

enum nss_status _nss_sleepy_getgrgid_r(gid_t gid, struct group *result, char *buffer, size_t size, int *error)
{
	return wait_then(NSS_STATUS_NOTFOUND, error);
}

enum nss_status _nss_sleepy_getgrnam_r(const char *name, struct group *result, char *buffer, size_t size, int *error)
{
	return wait_then(NSS_STATUS_NOTFOUND, error);
}
