// What elements do that the page makes while it runs. `app.js` puts the functions in, so that what shows an element need not
// know what it does.

export const handlers = {};
